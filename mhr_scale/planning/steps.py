"""The steps that are counted: of pre-training, of a wave of few-shot jobs, of an evaluation.

Each is the program's own step (`Trainer.accumulate`, `Wave.train_step`, `scoring`), on a model that
`Engine.build` and `Engine.prepare` make without memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhr_scale.adapters import Adapter, find_sites
from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    BackboneConfig,
    PretrainConfig,
    ScoringConfig,
    VariantConfig,
)
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone, place
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.start import stack
from mhr_scale.jobs.wave import Member, Wave
from mhr_scale.passes import scoring
from mhr_scale.planning.tracing import (
    StepCounter,
    Trace,
    combine,
    fake_tensors,
    give_place,
    gpu_kernels,
)
from mhr_scale.training import optim
from mhr_scale.training.trainer import Trainer

#: Blocks per stack of the two models whose counts are extrapolated to deeper ones: a first block, a
#: last one and some in between.
SHALLOW, DEEPER = 3, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The shape of a pass: rows, input tokens (`width`), tokens of a target or choice (`depth`).

    `n_tasks` is the number of different tasks among the rows, `n_choices` the choices of a row.
    Where width and depth are those of a row on average, `room` is the width and the depth of the
    longest, which padding, or attention over rows laid flat, has room for.
    """

    rows: int
    width: int
    depth: int
    n_tasks: int = 1
    n_choices: int = 1
    room: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Tokens of inputs and targets together."""
        return self.rows * (self.width + self.n_choices * self.depth)

    @property
    def rectangle(self) -> tuple[int, int]:
        """Tokens of the longest input, and of all choices of the longest row."""
        width, depth = self.room
        return max(self.width, width), self.n_choices * max(self.depth, depth)


def at_depth(blueprint: Blueprint, count: Callable[[Blueprint], Trace]) -> Trace:
    """The counts for a blueprint, extrapolated from shallow models: linear in each stack's depth.

    Stacks of the same depth are deepened together.
    """
    blocks = blueprint.family.blocks(blueprint.model_config)
    depths = {stack: listed.count for stack, listed in blocks.items()}
    if max(depths.values()) <= DEEPER:
        return count(blueprint)
    low = {stack: min(SHALLOW, depth) for stack, depth in depths.items()}
    base = count(_shallow(blueprint, low))
    parts = []
    for depth in dict.fromkeys(depths.values()):
        deeper = {s: n + (depths[s] == depth) for s, n in low.items()}
        more = depth - min(SHALLOW, depth)
        if more:
            parts.append((float(more), count(_shallow(blueprint, deeper))))
    rest = 1.0 - sum(factor for factor, _ in parts)
    return combine([(rest, base), *parts])


def _shallow(blueprint: Blueprint, depths: Mapping[str, int]) -> Blueprint:
    config = blueprint.family.resize(blueprint.model_config, depths)
    return replace(blueprint, model_config=config)


@dataclass(frozen=True, slots=True)
class ImaginedModel:
    """A backbone and its adapter on the meta device: tensors have shapes but no memory."""

    placed: PlacedBackbone
    adapter: Adapter | None


def imagine_model(
    blueprint: Blueprint,
    config: BackboneConfig,
    make: Callable[[nn.Module], Adapter] | None,
    *,
    always_backward: bool = False,
) -> ImaginedModel:
    """Build backbone and adapter as a run does, on the meta device; `make` builds the adapter."""
    config, blueprint = replace(config, quantise="none"), replace(blueprint, quantise="none")
    adapter = None
    if make is not None:
        with torch.device("meta"):
            adapter = make(make_model(blueprint))
    meta_engine = Engine({}, timeout_seconds=0.0, device=torch.device("meta"))
    sites = () if adapter is None else adapter.sites
    placed = place(meta_engine, config, blueprint, sites, always_backward=always_backward)
    if adapter is not None:
        adapter.bind(placed.adapted)
    return ImaginedModel(placed, adapter)


def fresh(
    config: AdapterConfig, n_tasks: int, *, row_gradients: bool = False
) -> Callable[[nn.Module], Adapter]:
    """A function that makes a fresh adapter of these settings for a bare model."""
    names = [str(number) for number in range(n_tasks)]
    return lambda model: Adapter(
        config,
        find_sites(model, config.layout, config.blocks),
        task_names=names,
        row_gradients=row_gradients,
    )


@contextmanager
def counted(
    imagined: ImaginedModel, *, on_gpu: bool
) -> Iterator[tuple[StepCounter, PlacedBackbone]]:
    """Count what runs inside the block, on fake tensors whose device is the CPU."""
    placed, adapter = imagined.placed, imagined.adapter
    counter = StepCounter(n_words=placed.model.config.vocab_size)
    kernels = gpu_kernels() if on_gpu else nullcontext()
    cpu_engine = Engine({}, timeout_seconds=0.0, device=torch.device("cpu"))
    blocks = placed.family.blocks(placed.model.config)
    with fake_tensors():
        give_place(placed.model, *([adapter] if adapter is not None else []))
        with kernels, counter.watch(placed.model, blocks):
            yield counter, replace(placed, engine=cpu_engine)


def trace_pretraining(
    config: PretrainConfig,
    blueprint: Blueprint,
    shape: Shape,
    *,
    n_tasks: int,
    accumulates: bool,
    on_gpu: bool,
) -> Trace:
    """One micro step and the update of pre-training, with `n_tasks` rows in the routing table.

    With `accumulates` the micro step is one that adds to the gradients of an earlier one.
    """
    row_gradients = optim.has_row_gradients(config.optim)
    make = fresh(config.adapter, n_tasks, row_gradients=row_gradients)
    imagined = imagine_model(blueprint, config.backbone, make)
    adapter = imagined.adapter
    assert adapter is not None
    with counted(imagined, on_gpu=on_gpu) as (counter, placed):
        unused: Any = None
        trainer = Trainer(
            config,
            placed=placed,
            adapter=adapter,
            tokens=unused,
            batches=unused,
            backbone_facts={},
        )
        packed = pack_step(config, placed, shape)
        adapter.users()  # made by the first step
        leave_gradients(trainer, packed)
        trainer.optimizer.step()  # it creates the optimizer's state
        trainer.optimizer.zero_grad()
        if accumulates:
            leave_gradients(trainer, packed)
        counter.forget_peaks()
        trainer.accumulate([packed])
        _start_update(counter)
        norm = optim.gradient_norm(adapter.parameters())
        if config.optim.clip_norm is not None:
            optim.clip_gradients(adapter.parameters(), norm, config.optim.clip_norm)
        trainer.optimizer.step()
        counter.held = _held(adapter, trainer.optimizer)
        return counter.trace()


def pack_step(config: PretrainConfig, placed: PlacedBackbone, shape: Shape) -> Packed:
    """A micro batch of rows of a shape as pre-training packs it."""
    return placed.pack(
        make_rows(shape),
        pad_multiple=config.batch.pad_multiple,
        at_least=shape.rectangle,
        is_flat=placed.lays_flat(config.batch.packing, "batch.packing"),
    )


def make_rows(shape: Shape, *, has_answers: bool = True) -> list[EncodedRow]:
    """Rows of a shape, sorted by task.

    The last has a token less on either side, if it has any left: so all are not equally long, which
    would need no masks, and no rectangle beside rows laid flat.
    """
    ids, answer = np.ones(shape.width, dtype=np.int64), np.ones(shape.depth, dtype=np.int64)
    answers = (answer,) * shape.n_choices if has_answers else ()
    tasks = sorted(row % shape.n_tasks for row in range(shape.rows))
    rows = [EncodedRow(ids, answers, task=task, number=n) for n, task in enumerate(tasks)]
    shorter = replace(
        rows[-1],
        input_ids=ids[min(1, shape.width - 1) :],
        answers=(*answers[:-1], *(last[min(1, shape.depth - 1) :] for last in answers[-1:])),
    )
    return [*rows[:-1], shorter]


def leave_gradients(trainer: Trainer, packed: Packed) -> None:
    """Give the adapter gradients as a micro step leaves them, without its passes."""
    adapter = trainer.adapter
    for parameter in adapter.inventory.parameters():
        parameter.grad = torch.zeros_like(parameter)
    logits = adapter.routing_logits
    if logits is not None and logits.requires_grad:
        distinct = tuple(dict.fromkeys(packed.tasks))
        adapter.add_routing_gradient(distinct, torch.zeros(len(distinct), *logits.shape[1:]))


def _start_update(counter: StepCounter) -> None:
    counter.is_update = True
    counter.segment = "update"
    counter.note()


def _held(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Bytes that outlive a step: gradients until they are dropped, and the optimizer's state."""
    gradients = sum(_size(p.grad) for p in adapter.parameters() if p.grad is not None)
    kept = (value for state in optimizer.state.values() for value in state.values())
    return {
        "gradients": gradients,
        "optimizer": sum(_size(value) for value in kept if isinstance(value, Tensor)),
    }


def _size(tensor: Tensor) -> float:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    return float(tensor.numel() * tensor.element_size())


# -- few-shot jobs ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShapedData:
    """A stand-in for a job's data, whose batches all have one shape."""

    rows: Sequence[EncodedRow]
    shape: tuple[int, int]

    def batch(self, step: int) -> Sequence[EncodedRow]:
        """The rows of any step."""
        return self.rows


def trace_wave(
    config: AdaptConfig,
    variant: VariantConfig,
    settings: AdapterConfig,
    blueprint: Blueprint,
    frozen: BackboneConfig,
    shape: Shape,
    *,
    n_jobs: int,
    on_gpu: bool,
) -> Trace:
    """One step of a wave of `n_jobs`; `settings` are a job's adapter, `shape` its batch."""
    names = [f"job {number}" for number in range(n_jobs)]
    make_single = fresh(replace(settings, private=False), 1)

    def make(model: nn.Module) -> Adapter:
        return stack(names, [make_single(model)] * n_jobs, routing_only=variant.kind == "routing")

    imagined = imagine_model(blueprint, frozen, make, always_backward=True)
    assert imagined.adapter is not None
    data: Any = ShapedData(make_rows(replace(shape, n_tasks=1)), shape.rectangle)
    jobs = [Job(task=name, seed=0, variant="planned") for name in names]
    members = [Member(job, data, config.protocol.steps) for job in jobs]
    with counted(imagined, on_gpu=on_gpu) as (counter, placed):
        wave = Wave(config, variant, members, imagined.adapter, step=0)
        engine: Any = _WatchedEngine(placed.engine, lambda: _finish_backward(counter, wave))
        placed.model.train()
        for _ in range(2):
            counter.forget_peaks()
            counter.is_update = False
            wave.train_step(replace(placed, engine=engine))
        gradients = counter.held["gradients"]
        counter.held = {**_held(wave.adapter, wave.optimizer), "gradients": gradients}
        return counter.trace()


class _WatchedEngine:
    """A stand-in for an engine that reports the end of every backward pass."""

    def __init__(self, engine: Engine, after_backward: Callable[[], None]) -> None:
        self.device = engine.device
        self.after_backward = after_backward


def _finish_backward(counter: StepCounter, wave: Wave) -> None:
    counter.held = _held(wave.adapter, wave.optimizer)
    _start_update(counter)


# -- evaluation ------------------------------------------------------------------------------------


def trace_scoring(
    options: ScoringConfig,
    settings: AdapterConfig | None,
    blueprint: Blueprint,
    frozen: BackboneConfig,
    shape: Shape,
    *,
    new_tokens: int = 0,
    on_gpu: bool,
) -> Trace:
    """One batch of ranked choices, or of answers of `new_tokens`.

    `settings` are those of the adapter; None is a bare backbone.
    """
    make = None if settings is None else fresh(settings, shape.n_tasks)
    imagined = imagine_model(blueprint, replace(frozen, recompute="none"), make)
    adapter = imagined.adapter
    imagined.placed.model.eval()
    rows = make_rows(shape, has_answers=not new_tokens)
    with counted(imagined, on_gpu=on_gpu) as (counter, placed):
        if new_tokens:
            tasks, beams = [row.task for row in rows], options.beams
            slots = (
                nullcontext() if adapter is None else adapter.slots(tasks, rows_per_example=beams)
            )
            with torch.no_grad(), slots:
                placed.family.run_generation(
                    placed.model, placed.pack(rows), beams=beams, new_tokens=new_tokens
                )
        else:
            is_flat = placed.lays_flat(options.packing, "scoring.packing")
            scoring.choice_losses(placed, adapter, rows, is_flat=is_flat)
        return counter.trace()
