"""Steps over real tensors and the most memory they took, for comparison with what `plan` says.

On the CPU the profiler's record of every allocation is added up, the insides of kernels included;
on a GPU the allocator is asked. Both count what a step adds to what lay there before it.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mhr_scale.adapters import Adapter
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.config import AdaptConfig, AdapterConfig, BackboneConfig, PretrainConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone, place
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.start import stack
from mhr_scale.jobs.wave import Member, Wave
from mhr_scale.passes import scoring
from mhr_scale.planning import steps
from mhr_scale.planning.steps import Shape
from mhr_scale.training import optim
from mhr_scale.training.trainer import Trainer

NOTHING: Any = None


def peak_of(action: Callable[[], object], device: torch.device) -> float:
    """Most bytes at once during `action`, above what lay there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return float(peak)


def open_model(backbone: BackboneConfig, make: Any) -> tuple[PlacedBackbone, Any]:
    """The backbone where a run would put it, and the adapter that `make` makes, bound to it."""
    blueprint = read_blueprint(backbone)
    with torch.device("meta"):
        bare = make_model(blueprint)
    adapter = make(bare)
    placed = place(Engine({}, timeout_seconds=60.0), backbone, blueprint, adapter.sites)
    adapter.bind(placed.adapted)
    return placed, adapter


def pretraining_peak(config: PretrainConfig, shape: Shape, *, n_tasks: int) -> float:
    row_gradients = optim.has_row_gradients(config.optim)
    make = steps.fresh(config.adapter, n_tasks, row_gradients=row_gradients)
    placed, adapter = open_model(config.backbone, make)
    trainer = Trainer(
        config,
        placed=placed,
        adapter=adapter,
        tokens=NOTHING,
        batches=NOTHING,
        backbone_facts={},
    )
    packed = steps.pack_step(config, placed, shape)

    def step() -> None:
        trainer.accumulate([packed])
        trainer.accumulate([packed])
        norm = optim.gradient_norm(adapter.parameters())
        optim.clip_gradients(adapter.parameters(), norm, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def first_and_second() -> None:
        step()
        step()

    return peak_of(first_and_second, placed.device)


def wave_peak(config: AdaptConfig, name: str, shape: Shape, *, n_jobs: int) -> float:
    variant = config.variants[name]
    assert config.backbone is not None
    assert variant.fresh is not None
    names = [f"job {number}" for number in range(n_jobs)]
    alone = steps.fresh(replace(variant.fresh, private=False), 1)

    def make(model: Any) -> Adapter:
        return stack(names, [alone(model)] * n_jobs, routing_only=variant.kind == "routing")

    placed, adapter = open_model(config.backbone, make)
    data: Any = steps.ShapedData(steps.make_rows(shape), shape.rectangle)
    members = [Member(Job(task=one, seed=0, variant=name), data, 100) for one in names]
    wave = Wave(config, variant, members, adapter, step=0)
    placed.model.train()

    def two_steps() -> None:
        for _ in range(2):
            wave.train_step(placed)

    return peak_of(two_steps, placed.device)


def scoring_peak(
    backbone: BackboneConfig, own: AdapterConfig, shape: Shape, *, packing: bool | None = None
) -> float:
    placed, adapter = open_model(backbone, steps.fresh(own, shape.n_tasks))
    placed.model.eval()
    rows = steps.make_rows(shape)
    is_flat = placed.lays_flat(packing, "scoring.packing")
    return peak_of(
        lambda: scoring.rank_choices(placed, adapter, rows, length_norm=1.0, is_flat=is_flat),
        placed.device,
    )
