"""Steps of the program on any device, the meta device included: of training, waves and ranking."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from measured_steps import NOTHING, open_model

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import AdaptConfig, AdapterConfig, BackboneConfig, PretrainConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.packed import Packed
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.start import stack
from mhr_scale.jobs.wave import Member, Wave
from mhr_scale.passes import scoring
from mhr_scale.planning import steps
from mhr_scale.planning.steps import Shape
from mhr_scale.training import optim
from mhr_scale.training.trainer import Trainer

#: A step, or a part of one; what it returns is of no interest.
Step = Callable[[], object]


def open_on(
    device: torch.device, backbone: BackboneConfig, make: Any, *, always_backward: bool = False
) -> tuple[PlacedBackbone, Any]:
    """Backbone and adapter on the meta device, or where a run would put them."""
    if device.type != "meta":
        return open_model(backbone, make)
    blueprint = read_blueprint(backbone)
    imagined = steps.imagine_model(blueprint, backbone, make, always_backward=always_backward)
    return imagined.placed, imagined.adapter


class Training:
    """Pre-training of a recipe; a step has one micro batch of each shape, packed on the host."""

    def __init__(
        self,
        config: PretrainConfig,
        shapes: Sequence[Shape],
        device: torch.device,
        *,
        n_tasks: int = 8,
    ) -> None:
        row_gradients = optim.has_row_gradients(config.optim)
        make = steps.fresh(config.adapter, n_tasks, row_gradients=row_gradients)
        self.placed, self.adapter = open_on(device, config.backbone, make)
        is_flat = self.placed.lays_flat(config.batch.packing, "batch.packing")
        self.micro_batches: list[Packed] = [
            self.placed.family.pack(
                steps.make_rows(shape), self.placed.model.config, is_flat=is_flat
            )
            for shape in shapes
        ]
        tasks = sorted({task for packed in self.micro_batches for task in packed.tasks})
        samples: Any = SimpleNamespace(
            samples=lambda step: [SimpleNamespace(task=task) for task in tasks]
        )
        with _any_fused():
            self.trainer = Trainer(
                config,
                placed=self.placed,
                adapter=self.adapter,
                tokens=NOTHING,
                batches=samples,
                backbone_facts={},
            )

    def step(self) -> None:
        """One optimizer step."""
        with _any_fused():
            self.trainer._train_step(self.micro_batches, time.monotonic())

    def accumulate(self) -> None:
        """Its passes alone."""
        self.trainer.accumulate(self.micro_batches)
        self.trainer.optimizer.zero_grad()


def _any_fused() -> Any:
    """Lets torch's fused optimizers be made for the meta device."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices as known

    name = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    return mock.patch(name, return_value=[*known(), "meta"])


def wave_step(
    config: AdaptConfig, shape: Shape, device: torch.device, *, n_jobs: int
) -> tuple[Wave, Step]:
    """A wave of the recipe's only variant, and a step of it."""
    ((name, variant),) = config.variants.items()
    assert variant.fresh is not None
    assert config.backbone is not None
    names = [f"job {number}" for number in range(n_jobs)]
    alone = steps.fresh(replace(variant.fresh, private=False), 1)

    def make(model: Any) -> Any:
        return stack(names, [alone(model)] * n_jobs, routing_only=variant.kind == "routing")

    placed, adapter = open_on(device, config.backbone, make)
    data: Any = steps.ShapedData(steps.make_rows(shape), shape.rectangle)
    members = [Member(Job(task=one, seed=0, variant=name), data, 100) for one in names]
    wave = Wave(config, variant, members, adapter, step=0)
    placed.model.train()
    return wave, lambda: wave.train_step(placed)


def ranking(
    backbone: BackboneConfig,
    own: AdapterConfig,
    shape: Shape,
    device: torch.device,
    **options: Any,
) -> Step:
    """A batch of ranked choices."""
    placed, adapter = open_on(device, backbone, steps.fresh(own, shape.n_tasks))
    placed.model.eval()
    rows = steps.make_rows(shape)
    return lambda: scoring.rank_choices(placed, adapter, rows, length_norm=1.0, **options)
