"""Settings of `finetune`: one exported LoRA on one task, with stock PEFT and bitsandbytes."""

from dataclasses import field
from typing import Literal

from mhr_scale.config.adaptation import ProtocolConfig
from mhr_scale.config.model import BackboneConfig, check_dropout, take_revision
from mhr_scale.config.training import TrackerName, check_betas, check_trackers
from mhr_scale.config.verbs import ScoringConfig
from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part, recipe
from mhr_scale.tasks.suites import EvalTasksConfig


@part
class FinetuneShotsConfig:
    """The few examples that are trained on."""

    seed: int = 42
    """Draws the examples, their order and their templates."""
    count: int | None = None
    """Training examples; null: T-Few's number (t0_eval), else all the suite gives."""
    folder: str | None = None
    """t0_eval: T-Few's few-shot files; null: the same draw from the train split."""

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"shots.count: {self.count} is not at least 1")


@part
class FinetuneBackboneConfig(BackboneConfig):
    """The frozen backbone; without a `name`, the one that the adapter's folder names."""

    def __post_init__(self) -> None:
        take_revision(self, name="backbone")
        check_dropout(self.dropout)
        if self.compile:
            raise ConfigError(
                "backbone.compile: true, and finetune runs PEFT's layers, which are not compiled; "
                "leave it out"
            )


@part
class FinetuneOptimConfig:
    """The optimizer of the LoRA's matrices: settings and defaults are those of `adapt`."""

    name: Literal["adafactor", "adamw", "paged_adamw_8bit"] = "adafactor"
    """transformers' Adafactor, torch's AdamW, or bitsandbytes' paged 8-bit AdamW (GPU)."""
    lr: float = 1e-3
    """Peak learning rate."""
    scale_parameter: bool = False
    """Adafactor: multiply the rate by max(1e-3, RMS of the tensor)."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.999
    """AdamW's second-moment decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; null switches clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"optim.{name}: {getattr(self, name)} is below 0")
        check_betas(self.beta1, self.beta2)


@part
class FinetuneRunConfig:
    """Where the run writes, and how often."""

    folder: str
    """The run folder; the same command continues what it finds there."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 100
    """Steps between saves to go on from (0: none)."""
    deterministic: bool = False
    """Whether operations run in deterministic forms only: on GPUs the same command then gives the
    same bits, more slowly; on CPUs it does anyway."""
    trackers: tuple[TrackerName, ...] = ()
    """Services that get the lines of metrics.jsonl too: tensorboard (in the run folder), wandb,
    trackio, mlflow (in the run folder without MLFLOW_TRACKING_URI)."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"run.log_every: {self.log_every} is not at least 1")
        if self.save_every < 0:
            raise ConfigError(f"run.save_every: {self.save_every} is below 0")
        check_trackers(self.trackers)


@recipe
class FinetuneConfig:
    """Everything `finetune` reads."""

    adapter: str
    """A PEFT LoRA folder, as `export` and PEFT write it, or `owner/name@revision:folder` of the
    hub."""
    backbone: FinetuneBackboneConfig = field(default_factory=FinetuneBackboneConfig)
    """The backbone that transformers loads, in 4 or 8 bits by `quantise` (`wo` stays in `dtype`
    there); `recompute` is activation checkpointing. Without `name`: the one the adapter's folder
    names."""
    tasks: EvalTasksConfig
    """The suite that has the task."""
    task: str
    """The task, by its name in the suite."""
    shots: FinetuneShotsConfig = field(default_factory=FinetuneShotsConfig)
    """The few training examples."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """Steps, batches, losses."""
    micro_batch_size: int = 8
    """Examples per forward pass; the rest of a batch is accumulated."""
    optim: FinetuneOptimConfig = field(
        default_factory=lambda: FinetuneOptimConfig(lr=3e-3, scale_parameter=True)
    )
    """The optimizer."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How answers are obtained and scored, before and after."""
    run: FinetuneRunConfig
    """Where to write."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size: {self.micro_batch_size} is not at least 1")
        if self.scoring.packing:
            raise ConfigError(
                "scoring.packing: true, but finetune runs stock parts, whose attention takes "
                "padded rows only; leave it out, or set it to false"
            )
        if self.backbone.config is not None and self.backbone.name is None:
            raise ConfigError(
                "backbone.name: finetune loads a backbone that is stored, not random weights of "
                "backbone.config; name a hub id or a folder, or neither: the adapter's folder does"
            )
