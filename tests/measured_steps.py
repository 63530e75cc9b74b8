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
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.backbone.blueprint import Blueprint, read_blueprint
from mhr_scale.config import AdaptConfig, AdapterConfig, BackboneConfig, PretrainConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.families.packed import EncodedRow
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


def open_model(backbone: BackboneConfig, make: Any) -> tuple[Engine, Any, Any, Blueprint]:
    blueprint = read_blueprint(backbone)
    engine = Engine({}, timeout_seconds=60.0)
    model = engine.build(backbone, blueprint)
    adapter = make(model) if make is not None else None
    if adapter is not None:
        adapter.bind(wrap(model, adapter.sites))
    return engine, engine.prepare(model, backbone), adapter, blueprint


def with_padding(batch: Any) -> Any:
    """The same batch, its last row one token shorter: real masks shut something out."""
    batch.attention_mask[-1, -1] = 0
    return batch


def pretraining_peak(config: PretrainConfig, shape: Shape, *, n_tasks: int) -> float:
    engine, model, adapter, _ = open_model(config.backbone, steps.fresh(config.adapter, n_tasks))
    trainer = Trainer(
        config,
        engine=engine,
        model=model,
        adapter=adapter,
        tokens=NOTHING,
        batches=NOTHING,
        backbone_facts={},
    )
    batch = with_padding(steps.make_batch(shape))

    def step() -> None:
        trainer.accumulate([batch])
        trainer.accumulate([batch])
        norm = optim.gradient_norm(adapter.parameters())
        optim.clip_gradients(adapter.parameters(), norm, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def first_and_second() -> None:
        step()
        step()

    return peak_of(first_and_second, engine.device)


def wave_peak(config: AdaptConfig, name: str, shape: Shape, *, n_jobs: int) -> float:
    variant = config.variants[name]
    assert config.backbone is not None
    assert variant.fresh is not None
    names = [f"job {number}" for number in range(n_jobs)]
    alone = steps.fresh(replace(variant.fresh, private=False), 1)

    def make(model: Any) -> Adapter:
        return stack(names, [alone(model)] * n_jobs, routing_only=variant.kind == "routing")

    engine, model, adapter, _ = open_model(config.backbone, make)
    depth = shape.n_choices * shape.depth
    padded = steps.train_row(replace(shape, width=shape.width - 1))
    rows = [steps.train_row(shape)] * (shape.rows - 1) + [padded]
    data: Any = steps.ShapedData(rows, (shape.width, depth))
    members = [Member(Job(task=one, seed=0, variant=name), data, 100) for one in names]
    wave = Wave(config, variant, members, adapter, step=0)
    model.train()

    def two_steps() -> None:
        for _ in range(2):
            wave.train_step(model, device=engine.device, after_backward=lambda: None)

    return peak_of(two_steps, engine.device)


def scoring_peak(backbone: BackboneConfig, own: AdapterConfig, shape: Shape) -> float:
    engine, model, adapter, _ = open_model(backbone, steps.fresh(own, shape.n_tasks))
    model.eval()
    rows = [
        EncodedRow(
            n,
            n % shape.n_tasks,
            [1] * (shape.width - (n == 0)),  # one is padded: its mask shuts something out
            ([1] * shape.depth,) * shape.n_choices,
        )
        for n in range(shape.rows)
    ]
    rows = sorted(rows, key=lambda row: row.task)
    return peak_of(
        lambda: scoring.rank_choices(model, adapter, rows, length_norm=1.0, device=engine.device),
        engine.device,
    )
