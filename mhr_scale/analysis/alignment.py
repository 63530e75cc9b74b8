"""Gradient alignment: do tasks pull the shared inventory in the same direction?

For every task t, g_t is the gradient of its mean language-model loss per target token with respect
to the inventory (A and B, or l), with the model in evaluation mode: no dropout, no routing noise,
each task under its own routing. Routing logits are left out: each of their rows belongs to one
task. The alignment of two tasks is cos(g_t, g_t'), that of an adapter the mean over all pairs
t < t': overall (g_t with all linears side by side), per layer (block) and per linear. The paper
(figure 3) gives no formula and the reference code no implementation: this definition is our own.

A task whose gradient is zero or not finite has no direction: it is left out, by name. A pair
without a direction in some layer is left out of that layer's mean.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mhr_scale.adapters import Adapter
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import AdapterError, RunError, some
from mhr_scale.families.modes import evaluate
from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes.filled import filled
from mhr_scale.passes.validation import forward, iter_packed
from mhr_scale.rows.tokens import TokenSet
from mhr_scale.run.runlog import log
from mhr_scale.seeds import seed_from

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignedTask:
    """The fixed rows of one task; their `task` is its number in the adapter."""

    name: str
    rows: tuple[EncodedRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientSource:
    """The model whose gradients are measured, and the rows per rank and pass."""

    placed: PlacedBackbone
    adapter: Adapter
    micro_batch_size: int
    pad_multiple: int
    is_flat: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """Cosines of the tasks that have a direction, and their means (None: no pair has one)."""

    tasks: tuple[str, ...]
    matrix: Matrix
    layers: dict[str, float | None]
    linears: dict[str, float | None]
    left_out: dict[str, str]
    """Why a task has no direction, by its name."""

    @property
    def mean(self) -> float | None:
        """Mean over the pairs of tasks."""
        return mean_of_pairs(self.matrix)


# -- the rows --------------------------------------------------------------------------------------


def sample_tasks(count: int, wanted: int | None, *, seed: int) -> list[int]:
    """Numbers of the compared tasks, ascending; they depend on the seed and the count alone."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(random.Random(seed_from("alignment", seed)).sample(range(count), wanted))


def fixed_rows(
    tokens: TokenSet,
    chosen: Sequence[int],
    *,
    rows: int,
    numbers: Mapping[str, int] | None = None,
) -> list[AlignedTask]:
    """The first validation rows of each chosen task, or training rows where it has none.

    `numbers` are the tasks' numbers in the adapter, by default those in `tokens`. The log names
    the tasks that have training rows only, or fewer rows than requested.
    """
    tasks, from_train, short = [], [], []
    for number in chosen:
        name = tokens.cards[number].name
        fold = tokens.validation[number]
        if len(fold) == 0:
            fold = tokens.train[number]
            from_train.append(name)
        if len(fold) < rows:
            short.append(name)
        task = number if numbers is None else numbers[name]
        chosen_rows = [
            replace(fold[n], answers=fold[n].answers[:1], task=task, number=n)
            for n in range(min(rows, len(fold)))
        ]
        tasks.append(AlignedTask(name=name, rows=tuple(chosen_rows)))
    if from_train:
        log.info("alignment: training rows, for want of held-out ones, of %s", some(from_train))
    if short:
        log.info("alignment: fewer than %d rows of %s", rows, some(short))
    return tasks


# -- gradients -------------------------------------------------------------------------------------


def check_shared(adapter: Adapter) -> None:
    """Raise `AdapterError` where tasks share no tensor whose gradients could be compared."""
    if adapter.config.private:
        raise AdapterError(
            "every task has an inventory of its own (private): its gradients touch no tensor of "
            "another task, so there is no alignment to measure"
        )


@contextmanager
def _inventory_alone(adapter: Adapter) -> Iterator[list[nn.Parameter]]:
    """Inside, only the inventory requires gradients; afterwards all is as before."""
    parameters = list(adapter.inventory.parameters())
    before = [(p, p.requires_grad) for p in adapter.parameters()]
    assert all(p.grad is None for p, _ in before), "gradients of a step would be lost"
    if adapter.routing_logits is not None:
        adapter.routing_logits.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter, needed in before:
            parameter.grad = None
            parameter.requires_grad_(needed)


def reduce_gradient(
    source: GradientSource, task: AlignedTask, parameters: Sequence[nn.Parameter]
) -> Tensor:
    """The task's gradient as one flat float64 tensor, summed over passes and ranks. Collective."""
    placed, adapter = source.placed, source.adapter
    size = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(size + 1, dtype=torch.float64, device=placed.device)
    parts = total[:size].split([parameter.numel() for parameter in parameters])
    for packed, is_counted in iter_packed(
        placed,
        task.rows,
        max_rows=source.micro_batch_size,
        pad_multiple=source.pad_multiple,
        is_flat=source.is_flat,
    ):
        with filled(adapter, packed) as slots:
            loss = forward(placed, packed)
            slots.backward(loss.sum.sum())
            placed.engine.after_backward()
        for part, parameter in zip(parts, parameters, strict=True):
            if is_counted and parameter.grad is not None:
                part += parameter.grad.reshape(-1)
            parameter.grad = None
        total[size] += loss.count.sum() * is_counted
    placed.engine.reduce_sum(total)
    return total[:size] / total[size]


def gather_alignment(
    source: GradientSource,
    tasks: Sequence[AlignedTask],
    *,
    advance: Callable[[str], object] = lambda name: None,
) -> Alignment:
    """Measure the alignment of some tasks. Collective; every rank gets the result.

    All ranks run the same passes. Gradients are summed in float64, so that the result does not
    depend on the number of ranks; rank 0 keeps one per task in host memory, in float32. Parameters,
    their gradients (none before, none after) and routing stay as they are; the model is left in
    evaluation mode.
    """
    engine, adapter = source.placed.engine, source.adapter
    check_shared(adapter)
    _check_room(engine, adapter, len(tasks))
    evaluate(source.placed.model)
    names: list[str] = []
    kept: list[Tensor] = []
    left_out: dict[str, str] = {}
    with _inventory_alone(adapter) as parameters:
        for task in tasks:
            gradient = reduce_gradient(source, task, parameters)
            norm = gradient.norm().item()
            if not math.isfinite(norm) or norm == 0.0:
                left_out[task.name] = "zero" if norm == 0.0 else "not finite"
            elif engine.rank == 0:
                names.append(task.name)
                kept.append(gradient.float().cpu())
            advance(task.name)
    for name, why in left_out.items():
        log.warning("alignment: task '%s' is left out: its gradient is %s", name, why)
    measured = _compare(adapter, names, kept, left_out) if engine.rank == 0 else None
    result: Alignment = engine.broadcast_object(measured)
    return result


def _check_room(engine: Engine, adapter: Adapter, n_tasks: int) -> None:
    """Raise `RunError`, on all ranks, if rank 0 cannot hold the gradients in memory. Collective."""
    needed = 4 * n_tasks * sum(p.numel() for p in adapter.inventory.parameters())
    free = engine.broadcast_object(psutil.virtual_memory().available)
    if needed > free:
        raise RunError(
            f"alignment: the gradients of {n_tasks} tasks take {needed / 1e9:.1f} GB of the host's "
            f"memory, {free / 1e9:.1f} GB are free; compare fewer tasks"
        )


# -- cosines ---------------------------------------------------------------------------------------


def _compare(
    adapter: Adapter, names: Sequence[str], gradients: Sequence[Tensor], left_out: dict[str, str]
) -> Alignment:
    """Cosines of the flat gradients, whose order is that of the inventory's parameters."""
    n = len(gradients)
    total = np.zeros((n, n))
    layers: dict[str, Matrix] = defaultdict(lambda: np.zeros((n, n)))
    linears: dict[str, float | None] = {}
    grams = linear_grams(adapter, gradients)
    for site, (name, gram) in zip(adapter.sites, grams.items(), strict=True):
        total += gram
        layers[site.routing_group("block", 1)] += gram
        linears[name] = mean_of_pairs(cosines(gram))
    return Alignment(
        tasks=tuple(names),
        matrix=cosines(total),
        layers={name: mean_of_pairs(cosines(gram)) for name, gram in layers.items()},
        linears=linears,
        left_out=left_out,
    )


def linear_grams(adapter: Adapter, gradients: Sequence[Tensor]) -> dict[str, Matrix]:
    """Inner products <g_t, g_t'> per linear, in float64, in the order of the adapter's sites."""
    grams = {site.name: np.zeros((len(gradients), len(gradients))) for site in adapter.sites}
    starts, start = {}, 0
    for name, parameter in adapter.inventory.named_parameters():
        starts[name] = start
        start += parameter.numel()
    for stack in adapter.inventory.stacks:
        for side in adapter.inventory.sides:
            first = starts[f"{side}_{stack.key}"]
            size = adapter.inventory.stacked(stack, side)[0].numel()
            for row, member in enumerate(stack.members):
                begin = first + row * size
                slices = [gradient[begin : begin + size] for gradient in gradients]
                if slices:
                    g_TP = torch.stack(slices).double()
                    grams[adapter.sites[member].name] += (g_TP @ g_TP.T).numpy()
    return grams


def cosines(gram: Matrix) -> Matrix:
    """Cosines from inner products: exactly symmetric, with a diagonal of exactly 1.

    NaN in the row and column of a vector that is zero.
    """
    squares = np.diag(gram)
    norms = np.sqrt(np.where(squares > 0.0, squares, np.nan))
    matrix = (gram + gram.T) / 2.0 / np.outer(norms, norms)
    matrix = np.clip(matrix, -1.0, 1.0)
    np.fill_diagonal(matrix, np.where(squares > 0.0, 1.0, np.nan))
    return matrix


def mean_of_pairs(matrix: Matrix) -> float | None:
    """Mean above the diagonal, of the pairs that have a cosine; None if there is none."""
    values: Any = matrix[np.triu_indices(len(matrix), k=1)]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
