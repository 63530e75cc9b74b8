"""Losses of fixed rows, with all ranks in step: validation, and other measurements on such rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mhr_scale.adapters import Adapter
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.families.sending import send_numbers
from mhr_scale.passes import losses
from mhr_scale.passes.filled import filled
from mhr_scale.rows.batching import cut_batches, deal


def forward(placed: PlacedBackbone, packed: Packed, *, label_smoothing: float = 0.0) -> losses.Loss:
    """Loss of each row: the frozen model with the slots in use."""
    return losses.language_model(
        placed.predictions(packed),
        packed.labels_BD,
        packed.sources,
        label_smoothing=label_smoothing,
    )


def iter_packed(
    placed: PlacedBackbone,
    rows: Sequence[EncodedRow],
    *,
    max_rows: int,
    pad_multiple: int,
    is_flat: bool,
) -> Iterator[tuple[Packed, bool]]:
    """This rank's batches of rows, packed, and whether each counts; the others are dummy passes."""
    engine = placed.engine
    batches = cut_batches(rows, max_rows=max_rows, is_flat=is_flat)
    rounds = deal(batches, engine.rank, engine.world_size, is_sharded=engine.is_sharded)
    for batch, is_counted in rounds:
        if batch is not None:
            packed = placed.pack(batch, pad_multiple=pad_multiple, is_flat=is_flat)
            yield packed, is_counted


@torch.no_grad()
def reduce_losses(
    placed: PlacedBackbone,
    adapter: Adapter,
    rows: Sequence[EncodedRow],
    *,
    max_rows: int,
    pad_multiple: int,
    is_flat: bool,
) -> dict[str, Any]:
    """Mean loss per target token of some rows, overall and by task with rows. Collective."""
    device = placed.device
    sums = torch.zeros(2, len(adapter.task_names), dtype=torch.float64, device=device)
    placed.model.eval()
    for packed, is_counted in iter_packed(
        placed, rows, max_rows=max_rows, pad_multiple=pad_multiple, is_flat=is_flat
    ):
        with filled(adapter, packed):
            loss = forward(placed, packed)
        if is_counted:
            index = send_numbers(packed.tasks, device)
            sums[0].index_add_(0, index, loss.sum.double())
            sums[1].index_add_(0, index, loss.count.double())
    placed.engine.reduce_sum(sums)
    totals, counts = sums.tolist()
    by_task = {
        name: total / count
        for name, total, count in zip(adapter.task_names, totals, counts, strict=True)
        if count
    }
    mean = sum(totals) / sum(counts) if sum(counts) else None
    return {"validation_loss": mean, "validation_loss_by_task": by_task}
