"""Losses of fixed rows, all ranks in step: validation, and what else is measured on such rows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mhr_scale.adapters import Adapter
from mhr_scale.engine.engine import Engine
from mhr_scale.passes import losses
from mhr_scale.rows.batching import Batch, Pick


def forward(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> losses.Loss:
    """Loss of each row: the frozen model with the slots in use."""
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        use_cache=False,
    )
    return losses.language_model(output.logits, batch.labels, label_smoothing=label_smoothing)


def dealt(chunks: Sequence[list[Pick]], engine: Engine) -> Iterator[tuple[list[Pick], bool]]:
    """This rank's micro batches of all, and whether each counts.

    Every rank gets equally many, for sharded weights are gathered together: the last round is
    filled up with a micro batch that does not count.
    """
    for start in range(0, len(chunks), engine.world_size):
        number = start + engine.rank
        yield chunks[min(number, len(chunks) - 1)], number < len(chunks)


@torch.no_grad()
def reduce_losses(
    model: nn.Module,
    adapter: Adapter,
    chunks: Sequence[list[Pick]],
    *,
    collate: Callable[[list[Pick]], Batch],
    engine: Engine,
) -> dict[str, Any]:
    """Mean loss per target token, overall and by task, of the tasks that have rows. Collective."""
    sums = torch.zeros(2, len(adapter.task_names), dtype=torch.float64, device=engine.device)
    model.eval()
    for chunk, is_counted in dealt(chunks, engine):
        batch = collate(chunk).to(engine.device)
        with adapter.slots(batch.task_ids):
            loss = forward(model, batch)
        if is_counted:
            index = torch.tensor(batch.task_ids, device=engine.device)
            sums[0].index_add_(0, index, loss.sum.double())
            sums[1].index_add_(0, index, loss.count.double())
    engine.reduce_sum(sums)
    totals, counts = sums.tolist()
    by_task = {
        name: total / count
        for name, total, count in zip(adapter.task_names, totals, counts, strict=True)
        if count
    }
    mean = sum(totals) / sum(counts) if sum(counts) else None
    return {"validation_loss": mean, "validation_loss_by_task": by_task}
