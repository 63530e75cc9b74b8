"""The steps that are counted: of pre-training, of a wave of few-shot jobs, of an evaluation.

Each is the program's own step (`Trainer.accumulate`, `Wave.train_step`, `scoring`), over a model
that `Engine.build` and `Engine.prepare` put together without memory.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.adapters import Adapter, find_sites
from mhr_scale.adapters.methods import wrap
from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    BackboneConfig,
    PretrainConfig,
    ScoringConfig,
    VariantConfig,
)
from mhr_scale.engine.engine import Engine
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.job_data import TrainRow
from mhr_scale.jobs.start import stack
from mhr_scale.jobs.wave import Member, Wave
from mhr_scale.passes import scoring
from mhr_scale.passes.scoring import ChoiceRow
from mhr_scale.planning.tracing import GpuKernels, Trace, Tracker, combine, imagination, imagine
from mhr_scale.rows.batching import Batch
from mhr_scale.training import optim
from mhr_scale.training.trainer import Trainer

#: Blocks per stack of the two models whose counts give those of a deeper one: a first block, a last
#: one and some in between.
SHALLOW, DEEPER = 3, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A pass: rows, tokens of an input, choices of a row, tokens of a target or a choice.

    `n_tasks` is the number of different tasks among the rows.
    """

    rows: int
    width: int
    depth: int
    n_tasks: int = 1
    n_choices: int = 1

    @property
    def tokens(self) -> int:
        """Positions in encoder and decoder."""
        return self.rows * (self.width + self.n_choices * self.depth)


def at_depth(blueprint: Blueprint, count: Callable[[Blueprint], Trace]) -> Trace:
    """The counts for a blueprint, from two or three shallow models: they are linear in depth."""
    whole = (blueprint.model_config.num_layers, blueprint.model_config.num_decoder_layers)
    if max(whole) <= DEEPER:
        return count(blueprint)
    low = tuple(min(SHALLOW, n) for n in whole)
    base = count(_shallow(blueprint, *low))
    if whole[0] == whole[1]:
        more = whole[0] - low[0]
        deeper = count(_shallow(blueprint, low[0] + 1, low[1] + 1))
        return combine([(1.0 - more, base), (float(more), deeper)])
    parts = []
    for which, name in enumerate(("encoder", "decoder")):
        more = whole[which] - low[which]
        if more:
            one = (low[0] + 1, low[1]) if name == "encoder" else (low[0], low[1] + 1)
            parts.append((float(more), count(_shallow(blueprint, *one))))
    rest = 1.0 - sum(factor for factor, _ in parts)
    return combine([(rest, base), *parts])


def _shallow(blueprint: Blueprint, encoder: int, decoder: int) -> Blueprint:
    config = copy.deepcopy(blueprint.model_config)
    config.num_layers, config.num_decoder_layers = encoder, decoder
    return replace(blueprint, model_config=config)


class Draughtsman(Engine):
    """An engine whose backbone is replicated, has no memory, and is never filled."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.is_sharded = 0, 1, False
        self.device = torch.device("meta")
        self._ds_content: dict[str, Any] = {}
        self._runtime = self._sequence = None

    def _fill(self, model: nn.Module, config: BackboneConfig, blueprint: Blueprint) -> None:
        """Leave the weights where they are: nowhere."""


@dataclass(slots=True)
class Drawing:
    """A model and its adapter on the meta device."""

    engine: Draughtsman
    model: Any
    adapter: Adapter | None


def draw(
    blueprint: Blueprint,
    config: BackboneConfig,
    make: Callable[[nn.Module], Adapter] | None,
    *,
    always_backward: bool = False,
) -> Drawing:
    """Build backbone and adapter as a run does; `make` makes the adapter for a bare model."""
    engine, config = Draughtsman(), replace(config, quantise="none")
    model = engine.build(config, blueprint)
    adapter = None
    if make is not None:
        with torch.device("meta"):
            adapter = make(model)
        adapter.bind(wrap(model, adapter.sites))
    model = engine.prepare(model, config, always_backward=always_backward)
    return Drawing(engine, model, adapter)


def fresh(config: AdapterConfig, n_tasks: int) -> Callable[[nn.Module], Adapter]:
    """Makes an adapter of some settings for a bare model."""
    names = [str(number) for number in range(n_tasks)]
    return lambda model: Adapter(config, find_sites(model, config.layout), task_names=names)


@contextmanager
def watched(drawing: Drawing, n_logits: int, *, on_gpu: bool) -> Iterator[Tracker]:
    """The block in which the model of a drawing runs and is counted."""
    tracker, kernels = Tracker(n_logits=n_logits), GpuKernels() if on_gpu else nullcontext()
    with imagination():
        modules = [drawing.model, *([drawing.adapter] if drawing.adapter is not None else [])]
        imagine(*modules)
        drawing.engine.device = torch.device("cpu")
        with kernels, tracker.watch(drawing.model):
            yield tracker


def trace_pretraining(
    config: PretrainConfig,
    blueprint: Blueprint,
    shape: Shape,
    *,
    n_tasks: int,
    accumulates: bool,
    on_gpu: bool,
) -> Trace:
    """One micro step and the update of pre-training, `n_tasks` in the routing table.

    With `accumulates` the micro step is one that finds gradients of another.
    """
    drawing = draw(blueprint, config.backbone, fresh(config.adapter, n_tasks))
    adapter = drawing.adapter
    assert adapter is not None
    n_logits = shape.rows * shape.depth * blueprint.model_config.vocab_size
    with watched(drawing, n_logits, on_gpu=on_gpu) as tracker:
        nothing: Any = None
        trainer = Trainer(
            config,
            engine=drawing.engine,
            model=drawing.model,
            adapter=adapter,
            tokens=nothing,
            batches=nothing,
            backbone_facts={},
        )
        batch = make_batch(shape)
        _make_state(trainer, batch.task_ids)
        for _ in range(2 if accumulates else 1):
            tracker.forget_peaks()
            trainer.accumulate([batch])
        _start_update(tracker)
        norm = optim.gradient_norm(adapter.parameters())
        if config.optim.clip_norm is not None:
            optim.clip_gradients(adapter.parameters(), norm, config.optim.clip_norm)
        trainer.optimizer.step()
        tracker.held = _held(adapter, trainer.optimizer)
        return tracker.trace()


def make_batch(shape: Shape) -> Batch:
    """A micro batch of a shape, its tasks side by side."""
    tasks = sorted(row % shape.n_tasks for row in range(shape.rows))
    input_ids = torch.ones(shape.rows, shape.width, dtype=torch.long)
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        labels=torch.ones(shape.rows, shape.depth, dtype=torch.long),
        task_ids=tuple(tasks),
        numbers=tuple(range(shape.rows)),
        n_tokens=shape.tokens,
        n_input_tokens=shape.rows * shape.width,
    )


def _make_state(trainer: Trainer, task_ids: Sequence[int]) -> None:
    """Let the optimizer make what it keeps, by a step of gradients that are zero."""
    adapter = trainer.adapter
    for parameter in adapter.inventory.parameters():
        parameter.grad = torch.zeros_like(parameter)
    logits = adapter.routing_logits
    if logits is not None and logits.requires_grad:
        distinct = tuple(dict.fromkeys(task_ids))
        adapter.add_routing_gradient(distinct, torch.zeros(len(distinct), *logits.shape[1:]))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def _start_update(tracker: Tracker) -> None:
    tracker.is_update = True
    tracker.segment = "update"
    tracker.note()


def _held(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Bytes that stay: gradients until they are dropped, the optimizer's tensors for good."""
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
    """What a wave asks of a job's data: every batch has one shape."""

    rows: Sequence[TrainRow]
    shape: tuple[int, int]

    def batch(self, step: int) -> Sequence[TrainRow]:
        """The rows of any step."""
        return self.rows


def trace_wave(
    config: AdaptConfig,
    variant: VariantConfig,
    own: AdapterConfig,
    blueprint: Blueprint,
    frozen: BackboneConfig,
    shape: Shape,
    *,
    n_jobs: int,
    on_gpu: bool,
) -> Trace:
    """One step of a wave of `n_jobs`; `own` are a job's adapter settings, `shape` its batch."""
    names = [f"job {number}" for number in range(n_jobs)]
    alone = fresh(replace(own, private=False), 1)

    def make(model: nn.Module) -> Adapter:
        return stack(names, [alone(model)] * n_jobs, routing_only=variant.kind == "routing")

    drawing = draw(blueprint, frozen, make, always_backward=True)
    assert drawing.adapter is not None
    depth = shape.n_choices * shape.depth
    data: Any = ShapedData([train_row(shape)] * shape.rows, (shape.width, depth))
    jobs = [Job(task=name, seed=0, variant="planned") for name in names]
    members = [Member(job, data, config.protocol.steps) for job in jobs]
    n_logits = n_jobs * shape.rows * depth * blueprint.model_config.vocab_size
    with watched(drawing, n_logits, on_gpu=on_gpu) as tracker:
        wave = Wave(config, variant, members, drawing.adapter, step=0)
        drawing.model.train()
        for _ in range(2):
            tracker.forget_peaks()
            tracker.is_update = False
            wave.train_step(
                drawing.model,
                device=drawing.engine.device,
                after_backward=lambda: _finish_backward(tracker, wave),
            )
        gradients = tracker.held["gradients"]
        tracker.held = {**_held(wave.adapter, wave.optimizer), "gradients": gradients}
        return tracker.trace()


def _finish_backward(tracker: Tracker, wave: Wave) -> None:
    tracker.held = _held(wave.adapter, wave.optimizer)
    _start_update(tracker)


def train_row(shape: Shape) -> TrainRow:
    """A training row of a shape."""
    return TrainRow([1] * shape.width, ([1] * shape.depth,) * shape.n_choices, 0)  # type: ignore[arg-type]


# -- evaluation ------------------------------------------------------------------------------------


def trace_scoring(
    options: ScoringConfig,
    own: AdapterConfig | None,
    blueprint: Blueprint,
    frozen: BackboneConfig,
    shape: Shape,
    *,
    new_tokens: int = 0,
    on_gpu: bool,
) -> Trace:
    """One batch of ranked choices, or of answers of `new_tokens`; without `own` settings bare."""
    make = None if own is None else fresh(own, shape.n_tasks)
    drawing = draw(blueprint, replace(frozen, recompute="none"), make)
    drawing.model.eval()
    tasks = sorted(row % shape.n_tasks for row in range(shape.rows))
    choices = () if new_tokens else (([1] * shape.depth,) * shape.n_choices)
    rows: Any = [
        ChoiceRow(number, task, [1] * shape.width, choices)  # type: ignore[arg-type]
        for number, task in enumerate(tasks)
    ]
    n_logits = shape.rows * shape.n_choices * shape.depth * blueprint.model_config.vocab_size
    with watched(drawing, n_logits, on_gpu=on_gpu) as tracker:
        if new_tokens:
            with torch.no_grad():
                _generate(drawing, tasks, shape, beams=options.beams, new_tokens=new_tokens)
        else:
            scoring.choice_losses(drawing.model, drawing.adapter, rows)
        return tracker.trace()


def _generate(
    drawing: Drawing, tasks: list[int], shape: Shape, *, beams: int, new_tokens: int
) -> None:
    """What generation runs: the encoder, then the decoder token by token over its cache.

    transformers' own loop asks the values of tensors when to stop, and these have none.
    """
    model, adapter = drawing.model, drawing.adapter
    ids = torch.ones(shape.rows, shape.width, dtype=torch.long)
    with nullcontext() if adapter is None else adapter.slots(tasks):
        states = model.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids))
        states["last_hidden_state"] = states.last_hidden_state.repeat_interleave(beams, 0)
        mask, cache = torch.ones_like(ids).repeat_interleave(beams, 0), None
        for _ in range(new_tokens):
            output = model(
                encoder_outputs=states,
                attention_mask=mask,
                decoder_input_ids=ids.new_ones(shape.rows * beams, 1),
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
