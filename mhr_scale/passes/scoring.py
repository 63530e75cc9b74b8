"""Ranking answer choices and generating answers, in batches filled by token count.

Shape letters: B batch rows (examples), D target positions with choices side by side, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mhr_scale.adapters import Adapter
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import DataError, DivergenceError
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.passes import losses
from mhr_scale.passes.filled import filled
from mhr_scale.rows.batching import Batch, deal
from mhr_scale.run import stopping

T = TypeVar("T")

#: Tokens of choices behind one input at most, if the input is not half as long.
MOST_BEHIND = 1024


def score(
    batches: Sequence[Batch], run: Callable[[Batch], list[T]], *, engine: Engine
) -> Iterator[dict[int, T]]:
    """Run batches in rounds; after each round, yield its results by row number.

    Collective: every rank passes the same batches and iterates to the end, and gets all ranks'
    results. Raises `Stopped` on all ranks between two rounds if one was asked to stop. `run`
    returns a value for every row of a batch (`questions.answerers`).
    """
    rounds = deal(batches, engine.rank, engine.world_size, is_sharded=engine.is_sharded)
    is_stopped = False
    for batch, is_counted in rounds:
        if is_stopped:
            raise stopping.stop("all answers so far are written")
        values = run(batch) if batch is not None else []
        local: dict[int, T] = {}
        if batch is not None and is_counted:
            local = {row.number: value for row, value in zip(batch, values, strict=True)}
        results: dict[int, T] = {}
        for part, is_asked in engine.gather_objects((local, stopping.is_asked())):
            results.update(part)
            is_stopped |= is_asked
        yield results


@contextmanager
def _evaluation(model: nn.Module, slots: AbstractContextManager[object]) -> Iterator[None]:
    """Evaluation mode without gradients, inside the block of the slots."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad(), slots:
            yield
    finally:
        if was_training:
            model.train()


def rank_choices(
    placed: PlacedBackbone,
    adapter: Adapter | None,
    batch: Batch,
    *,
    length_norm: float,
    is_flat: bool = False,
    is_shared: bool = False,
) -> list[list[float]]:
    """Score every choice of every row: the smallest wins.

    A score is the summed negative log-likelihood of a choice's tokens, end of sequence included, in
    float32, over length ** `length_norm`. Without an adapter the model runs as it is: bare, or
    inside the caller's `adapter.off()`. Raises `DivergenceError` if a score is not finite.
    """
    nll_BD, packed = choice_losses(placed, adapter, batch, is_flat=is_flat, is_shared=is_shared)
    scores = []
    # the only device sync; sums on the host do not depend on the order of threads
    for row, sums in zip(batch, _by_choice(batch, packed, nll_BD, np.add), strict=True):
        lengths = np.array([len(choice) for choice in row.answers], dtype=np.float32)
        values: list[float] = (sums / lengths**length_norm).tolist()
        if not np.isfinite(values).all():
            is_exact = placed.model.get_input_embeddings().weight.dtype == torch.float32
            way_out = "train the adapter with a lower optim.lr, or check the backbone's weights"
            raise DivergenceError(
                f"row {row.number}: the scores {values} are not finite; "
                f"{way_out if is_exact else 'try the backbone in float32'}"
            )
        scores.append(values)
    return scores


def judge_choices(
    placed: PlacedBackbone,
    adapter: Adapter | None,
    batch: Batch,
    *,
    is_flat: bool = False,
    is_shared: bool = False,
) -> list[list[tuple[float, bool]]]:
    """Every choice's summed log-likelihood, and whether each of its tokens is the likeliest."""

    def read(logits: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        return (
            losses.token_losses(logits, packed.labels_BD, packed.sources),
            losses.are_likeliest(logits, packed.labels_BD, packed.sources),
        )

    options = {"is_flat": is_flat, "is_shared": is_shared}
    (nll_BD, hits_BD), packed = _read_choices(placed, adapter, batch, read, **options)
    sums = _by_choice(batch, packed, nll_BD, np.add)
    hits = _by_choice(batch, packed, hits_BD, np.logical_and)
    return [
        list(zip((-row_sums).tolist(), row_hits.tolist(), strict=True))
        for row_sums, row_hits in zip(sums, hits, strict=True)
    ]


def choice_losses(
    placed: PlacedBackbone,
    adapter: Adapter | None,
    batch: Batch,
    *,
    is_flat: bool = False,
    is_shared: bool = False,
) -> tuple[Tensor, Packed]:
    """Negative log-likelihood of each choice's tokens, a row's choices side by side: (B, D).

    In float32, on the device, 0 where padded; the packed rows tell which positions belong to which
    choice. A row of very many tokens to choose from is several of them (`split`). With `is_shared`
    rows are laid flat, and what prompts of a task begin with alike is computed once.
    """

    def read(logits: Tensor, packed: Packed) -> Tensor:
        return losses.token_losses(logits, packed.labels_BD, packed.sources)

    return _read_choices(placed, adapter, batch, read, is_flat=is_flat, is_shared=is_shared)


def _read_choices(
    placed: PlacedBackbone,
    adapter: Adapter | None,
    batch: Batch,
    read: Callable[[Tensor, Packed], T],
    *,
    is_flat: bool,
    is_shared: bool,
) -> tuple[T, Packed]:
    """What is read of the logits of packed rows, and those."""
    for row in batch:
        if not row.answers:
            raise DataError(f"row {row.number}: no choices to rank")
    if is_shared:
        packed = placed.pack_shared(batch)
    else:
        packed = placed.pack([part for row in batch for part in split(row)], is_flat=is_flat)
    slots = packed.in_use() if adapter is None else filled(adapter, packed)
    with _evaluation(placed.model, slots):
        return read(placed.predictions(packed), packed), packed


def _by_choice(
    batch: Batch, packed: Packed, values_BD: Tensor, operation: np.ufunc
) -> Iterator[Any]:
    """For each row of a batch, its choices' values, those of their tokens put together (C,)."""
    parts = zip(packed.rows, packed.starts, values_BD.cpu().numpy(), strict=True)
    for row in batch:
        pieces: list[Any] = []
        while sum(map(len, pieces)) < len(row.answers):
            part, starts, values_D = next(parts)
            pieces.append(operation.reduceat(values_D[: part.n_answer_tokens], starts))
        yield np.concatenate(pieces)


def split(row: EncodedRow) -> list[EncodedRow]:
    """A row with its choices, or several with some of them each, in order.

    Attention is quadratic in what stands behind one input: there are at most `MOST_BEHIND` tokens
    of choices, or twice the input's, which then costs half as much again as it would once.
    """
    most = max(MOST_BEHIND, 2 * len(row.input_ids))
    groups: list[list[Any]] = [[]]
    size = 0
    for answer in row.answers:
        if groups[-1] and size + len(answer) > most:
            groups.append([])
            size = 0
        groups[-1].append(answer)
        size += len(answer)
    return [replace(row, answers=tuple(group), label=0) for group in groups]


def generate_answers(
    placed: PlacedBackbone,
    adapter: Adapter | None,
    batch: Batch,
    tokenizer: Any,
    *,
    beams: int,
    max_new_tokens: int,
) -> list[str]:
    """The best answer to each row, greedy or by beam search, as text without special tokens."""
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": max_new_tokens}
    ids = generate_ids(placed, adapter, batch, **options)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def generate_ids(
    placed: PlacedBackbone, adapter: Adapter | None, batch: Batch, **options: Any
) -> list[list[int]]:
    """What the model writes to each row, as token ids; `options` are those of `generate`.

    Under ZeRO-3, where every step gathers weights, ranks take as many steps as the slowest one.
    """
    tasks, beams = [row.task for row in batch], options.get("num_beams", 1)
    slots = nullcontext() if adapter is None else adapter.slots(tasks, rows_per_example=beams)
    with _evaluation(placed.model, slots):
        return placed.family.generate(
            placed.model,
            batch,
            device=placed.device,
            use_cache=True,
            synced_gpus=placed.engine.is_sharded,
            **options,
        )
