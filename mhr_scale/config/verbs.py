"""Everything one verb reads: its parts put together."""

from dataclasses import field

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
