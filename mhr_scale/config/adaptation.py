"""Settings of `adapt`: which few-shot jobs there are, how they train, when they stop."""

from dataclasses import field, replace
from typing import Literal

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.config.model import BackboneConfig, SoupConfig
from mhr_scale.config.training import (
    BatchConfig,
    Cut,
    OptimConfig,
    TrackerName,
    check_timeout,
    check_trackers,
)
from mhr_scale.config.verbs import ScoringConfig
from mhr_scale.errors import ConfigError, suggest
from mhr_scale.recipe.part import part, recipe
from mhr_scale.tasks.suite import ShotsConfig
from mhr_scale.tasks.suites import EvalTasksConfig


@part
class VariantConfig:
    """One way to adapt: what a job starts from and which of its tensors train."""

    adapter: str | None = None
    """The run or adapter to start from, a folder or `owner/name@revision:folder` of the hub; null:
    fresh tensors of the settings under `fresh`."""
    fresh: AdapterConfig | None = None
    """Settings of an adapter that starts from nothing."""
    kind: Literal["full", "routing", "average", "soup", "backbone"] = "full"
    """full: inventory and a fresh routing row; routing: that row alone (-z); average: the inventory
    under uniform routing (-mu); soup: the mean of similar tasks' pairs; backbone: full, and the
    backbone's weights too (full fine-tuning): one job at a time, replicated, in float32. Such a job
    is not saved in the middle: if it is interrupted, it starts again."""
    trainable: Literal["mean", "inventory"] = "mean"
    """average: train the mean as one adapter, or all skills under uniform routing (reference)."""
    soup: SoupConfig = field(default_factory=SoupConfig)
    """Settings of kind soup."""
    steps: int | None = None
    """Optimizer steps; null: the protocol's."""
    lr: float | None = None
    """Peak rate of the inventory; null: `optim.lr`."""
    routing_lr: float | None = None
    """Peak rate of the routing logits; null: `optim.routing_lr`."""
    backbone_lr: float = 1e-4
    """backbone: peak rate of the backbone's weights; other settings, weight decay too: `optim`."""

    def __post_init__(self) -> None:
        if (self.adapter is None) == (self.fresh is None):
            raise ConfigError("variants: give each an adapter to start from, or fresh settings")
        if self.fresh is not None and self.kind not in ("full", "backbone"):
            raise ConfigError(
                f"variants: kind {self.kind} starts from an adapter, not from nothing"
            )
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"variants: steps {self.steps} is not at least 1")


@part
class SelectionConfig:
    """Which of a job's checkpoints is kept."""

    on: Literal["test", "validation", "shots", "held_out", "last"] | None = None
    """test: the reported rows themselves (the reference on T0; optimistic); validation: the
    suite's validation rows; shots: those set aside; last: no selection; held_out: validation for
    tasks that have rows of it beside the reported ones, last for the others. Null: held_out for
    your own tasks (jsonl) and CrossFit's, test for the others."""
    every_epochs: int = 50
    """Epochs between evaluations."""
    at_start: bool = True
    """Evaluate before training too, as the reference does."""
    patience: int | None = None
    """Stop a job after so many evaluations in a row without a better one; null: never."""

    def __post_init__(self) -> None:
        if self.every_epochs < 1:
            raise ConfigError(f"selection.every_epochs: {self.every_epochs} is not at least 1")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"selection.patience: {self.patience} is not at least 1")


@part
class ProtocolConfig:
    """How every job trains."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Examples per step; what is left of an epoch is dropped."""
    warmup_fraction: float = 0.06
    """Linear warm-up from 0, as a share of the steps; then linear decay to 0."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 after the warm-up, or none."""
    loss: Literal["t_few", "language_model"] = "t_few"
    """t_few: likelihood, ranking and unlikelihood over the choices, for a row without choices the
    likelihood alone; language_model: the likelihood of the target alone for all."""
    label_smoothing: float = 0.0
    """language_model: share of the target's probability spread over the vocabulary."""
    normalise: Literal["tokens", "examples"] = "tokens"
    """language_model: divide a job's loss by its target tokens (T0) or examples (SuperNI)."""
    references: Literal["first", "random"] = "first"
    """Training target of a row with several references: the first, or one drawn per epoch."""
    mc_weight: float = 1.0
    """t_few: weight of the ranking loss."""
    ul_weight: float = 1.0
    """t_few: weight of the unlikelihood loss."""
    length_norm: float = 1.0
    """t_few: scores inside the ranking loss are divided by length ** length_norm."""
    max_input_tokens: int = 256
    """Training inputs are cut here."""
    cut: Cut | None = None
    """Where over-long inputs lose tokens, as `batch.cut` in pre-training."""
    max_target_tokens: int = 256
    """Training targets and choices are cut here, the end-of-sequence token kept."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_input_tokens", "max_target_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"protocol.{name}: {getattr(self, name)} is not at least 1")
        if not 0.0 <= self.warmup_fraction <= 1.0:
            raise ConfigError(f"protocol.warmup_fraction: {self.warmup_fraction} is not in [0, 1]")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f"protocol.label_smoothing: {self.label_smoothing} is not in [0, 1)")

    @property
    def lengths(self) -> BatchConfig:
        """How training rows are cut."""
        return BatchConfig(
            max_input_tokens=self.max_input_tokens,
            max_target_tokens=self.max_target_tokens,
            cut=self.cut,
        )


@part
class WavesConfig:
    """How jobs share passes of the backbone."""

    size: int | None = None
    """Jobs per wave; null: as many as the device's memory holds, 32 at most."""
    save_every: int = 0
    """Steps between saves of unfinished jobs; 0: at evaluations only."""
    packing: bool | None = None
    """Whether rows are trained on one behind another in one sequence, without padding; null: where
    the backbone's attention allows it."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ConfigError(f"waves.size: {self.size} is not at least 1")
        if self.save_every < 0:
            raise ConfigError(f"waves.save_every: {self.save_every} is below 0")


@part
class AdaptRunConfig:
    """Where jobs write, and under which DeepSpeed file they run."""

    folder: str
    """The run folder: `jobs/<task>/<seed>/<variant>/`; the same command continues it."""
    log_every: int = 10
    """Steps between lines of a job's metrics.jsonl."""
    ds_config: str | None = None
    """DeepSpeed file, or the name of one in ds_configs/ (zero3): placement; null: replicated."""
    timeout_seconds: float = 1800.0
    """How long a collective may wait for the other ranks."""
    deterministic: bool = False
    """Whether operations run in deterministic forms only: on GPUs the same command then gives the
    same bits, more slowly; on CPUs it does anyway."""
    trackers: tuple[TrackerName, ...] = ()
    """Services that get the lines of every job's metrics.jsonl too, as a run of its own in one
    group: tensorboard (in the jobs' folders), wandb, trackio, mlflow."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"run.log_every: {self.log_every} is not at least 1")
        check_timeout(self.timeout_seconds)
        check_trackers(self.trackers)


@recipe
class AdaptConfig:
    """Everything `adapt` reads: tasks x seeds x variants are the jobs."""

    variants: dict[str, VariantConfig]
    """The ways to adapt, by their names in tables and folders."""
    gain_over: str | None = None
    """The variant that the others' average relative gain is measured against, such as one that
    starts from nothing; null: no gain."""
    tasks: EvalTasksConfig
    """The tasks to adapt to."""
    shots: ShotsConfig = field(default_factory=ShotsConfig)
    """The few training examples."""
    backbone: BackboneConfig | None = None
    """The backbone, if every variant is fresh; with adapters, how their backbone is run."""
    backbone_moved_to: str | None = None
    """Where the adapters' backbone is now, if it has moved since they were trained."""
    backbone_dtype: Literal["bfloat16", "float32"] | None = None
    """Data type of the backbone, if not the one the adapters were trained with."""
    backbone_quantise: Literal["none", "int8", "nf4"] | None = None
    """Frozen linears in 8 or 4 bits or neither, if not as the adapters were trained."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """Steps, batches, losses."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3, scale_parameter=True))
    """The optimizer; every job has statistics, rates and clipping of its own."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Evaluation while training, best checkpoint, early stop."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How answers are obtained and scored."""
    waves: WavesConfig = field(default_factory=WavesConfig)
    """How jobs share passes."""
    run: AdaptRunConfig
    """Where to write."""

    @property
    def backbone_variants(self) -> list[str]:
        """The variants that train the backbone too; each of their jobs has a wave of its own."""
        return [name for name, variant in self.variants.items() if variant.kind == "backbone"]

    def __post_init__(self) -> None:
        if not self.variants or "" in self.variants:
            raise ConfigError("variants: name at least one, and each of them")
        for name in self.variants:
            if not name.isprintable():
                raise ConfigError(f"variants: {name!a} has a character that cannot be printed")
        if self.gain_over is not None and self.gain_over not in self.variants:
            raise ConfigError(
                f"gain_over: no variant '{self.gain_over}'"
                f"{suggest(self.gain_over, sorted(self.variants))}; name one of the variants"
            )
        if self.selection.on is None:
            chosen = replace(self.selection, on=self.tasks.selects_on)
            object.__setattr__(self, "selection", chosen)  # a default that hangs on the suite
        if self.selection.on == "shots" and not self.shots.set_aside:
            raise ConfigError("selection.on: shots needs shots.set_aside, the shots to select on")
