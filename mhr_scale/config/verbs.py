"""Everything one verb reads: its parts put together."""

from dataclasses import field
from typing import Literal

from mhr_scale.config.data import MixtureConfig, TasksConfig
from mhr_scale.config.model import AdapterConfig, BackboneConfig
from mhr_scale.config.part import part
from mhr_scale.config.training import (
    BatchConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from mhr_scale.errors import ConfigError


@part
class PretrainConfig:
    """Everything `pretrain` reads."""

    backbone: BackboneConfig
    """The frozen encoder-decoder."""
    adapter: AdapterConfig
    """The adapter trained on it."""
    tasks: TasksConfig
    """The training tasks; `suite` chooses the kind."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How tasks share the sample stream."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The training loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    schedule: ScheduleConfig
    """Length and learning-rate shape."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Batch shape."""
    run: RunConfig
    """Where to write."""


@part
class AverageConfig:
    """Everything `average` reads; model, tasks and training come from the source run."""

    source: str
    """The run to average; without extra steps an adapter folder will do."""
    steps: tuple[int, ...] = (0,)
    """Numbers of extra steps after which the averaged adapter is written; 0 trains nothing."""
    trainable: Literal["mean", "inventory"] = "mean"
    """Extra steps train the mean as one adapter, or the whole inventory under uniform routing."""
    warmup_fraction: float = 0.06
    """Warm-up of the extra steps, as a share of the largest number; then linear decay to 0."""
    run: RunConfig
    """Where to write, and how the extra steps run."""

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 0 or list(self.steps) != sorted(set(self.steps)):
            raise ConfigError(f"steps: {list(self.steps)} are not ascending numbers from 0")
        if not 0.0 <= self.warmup_fraction <= 1.0:
            raise ConfigError(f"warmup_fraction: {self.warmup_fraction} is not in [0, 1]")
