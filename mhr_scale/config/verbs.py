"""The recipes of `pretrain`, `average` and `evaluate`, put together from parts."""

from dataclasses import field
from typing import Any, Literal

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.config.analyse import MonitorConfig
from mhr_scale.config.model import ArrowConfig, BackboneConfig, SoupConfig
from mhr_scale.config.training import (
    BatchConfig,
    Cut,
    LossConfig,
    OptimConfig,
    PlainRunConfig,
    RunConfig,
    ScheduleConfig,
)
from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part, recipe
from mhr_scale.tasks.mixture import MixtureConfig
from mhr_scale.tasks.suites import EvalTasksConfig, TasksConfig


@recipe
class PretrainConfig:
    """Everything `pretrain` reads."""

    backbone: BackboneConfig
    """The frozen backbone."""
    adapter: AdapterConfig
    """The adapter trained on it."""
    source: str | None = None
    """The run or adapter to start from, of the same settings: a folder, or `owner/name@revision` of
    the hub (a folder in it after a `:`); null: fresh tensors. Tasks that it does not know get fresh
    rows of the routing tensor."""
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
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is measured during training."""
    run: RunConfig
    """Where to write."""

    def __post_init__(self) -> None:
        if self.monitor.alignment_every and self.adapter.private:
            raise ConfigError(
                "monitor.alignment_every: private inventories share no tensor whose gradients "
                "could be compared; set it to 0"
            )


@recipe
class AverageConfig:
    """Everything `average` reads; model, tasks and training come from the source run."""

    source: str
    """The run to average; without extra steps an adapter folder will do, and one of the hub
    (`owner/name@revision:folder`)."""
    steps: tuple[int, ...] = (0,)
    """Numbers of extra steps after which the averaged adapter is written; 0 trains nothing."""
    trainable: Literal["mean", "inventory"] = "mean"
    """Extra steps train the mean as one adapter, or the whole inventory under uniform routing."""
    warmup_fraction: float = 0.06
    """Warm-up of the extra steps, as a share of the largest number; then linear decay to 0."""
    tasks: dict[str, Any] | None = None
    """Settings of the source run's tasks that are others here, such as `folder`, if they have moved
    or are relative to another folder than the current one."""
    backbone_moved_to: str | None = None
    """Where the source run's backbone is now, if it has moved since training."""
    run: RunConfig
    """Where to write, and how the extra steps run."""

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 0 or list(self.steps) != sorted(set(self.steps)):
            raise ConfigError(f"steps: {list(self.steps)} are not ascending numbers from 0")
        if not 0.0 <= self.warmup_fraction <= 1.0:
            raise ConfigError(f"warmup_fraction: {self.warmup_fraction} is not in [0, 1]")
        for name in ("tasks", "backbone_moved_to"):
            if getattr(self, name) is not None and not self.steps[-1]:
                raise ConfigError(f"{name}: only extra steps read tasks and backbone; set steps")


@part
class ScoringConfig:
    """How answers are obtained and scored."""

    metric: Literal["accuracy", "rougeL", "exact_match"] | None = None
    """accuracy ranks the choices, the others generate; null: each task's own."""
    length_norm: float = 1.0
    """A choice's negative log-likelihood is divided by length ** length_norm (T-Few 1, T0 0)."""
    beams: int = 1
    """Beams of generation; 1 is greedy."""
    max_new_tokens: int = 64
    """Tokens generated at most."""
    max_input_tokens: int = 256
    """Inputs are cut here."""
    cut: Cut | None = None
    """Where over-long inputs lose tokens, as `batch.cut` in pre-training."""
    max_choice_tokens: int = 256
    """Choices are cut here, the end-of-sequence token kept."""
    max_tokens: int = 4096
    """Tokens of one batch on one rank, inputs and choices together; padded ones, but for packed
    rows, of which those that share the beginning of their prompts count it once."""
    packing: bool | None = None
    """Whether rows are ranked one behind another in one sequence, without padding and, over
    decoder-only backbones, what prompts of a task begin with alike once; null: where the backbone's
    attention allows it."""
    examples: int | None = None
    """Examples per task at most, the first ones; null = all."""
    texts: bool | None = None
    """Whether scores.jsonl holds the texts of inputs and choices; null: below 50,000 rows."""

    def __post_init__(self) -> None:
        names = ("beams", "max_new_tokens", "max_input_tokens", "max_choice_tokens", "max_tokens")
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"scoring.{name}: {getattr(self, name)} is not at least 1")
        if self.examples is not None and self.examples < 1:
            raise ConfigError(f"scoring.examples: {self.examples} is not at least 1")

    @property
    def lengths(self) -> BatchConfig:
        """How rows are cut."""
        return BatchConfig(
            max_input_tokens=self.max_input_tokens,
            max_target_tokens=self.max_choice_tokens,
            cut=self.cut,
        )


@recipe
class EvaluateConfig:
    """Everything `evaluate` reads; with an adapter, the model part comes from it."""

    adapter: str | None = None
    """The run or adapter to evaluate, a folder or `owner/name@revision:folder` of the hub; null:
    the bare backbone."""
    backbone: BackboneConfig | None = None
    """The bare backbone; an adapter brings its own."""
    backbone_moved_to: str | None = None
    """Where the adapter's backbone is now, if it has moved since training."""
    backbone_dtype: Literal["bfloat16", "float32"] | None = None
    """Data type of the backbone, if not the one the adapter was trained with."""
    backbone_quantise: Literal["none", "int8", "nf4"] | None = None
    """Frozen linears in 8 or 4 bits or neither, if not as the adapter was trained."""
    routing: Literal["own", "average", "soup", "arrow", "off"] = "own"
    """own: each task under its own routing; average: all tasks under the averaged adapter; soup:
    each task under the mean of similar training tasks' private adapters, found by its inputs;
    arrow: every token under those LoRAs of a run with private ones, or of a folder of LoRAs, that
    it lies along; off: the adapter's backbone without it."""
    extra_steps: Literal["all"] | tuple[int, ...] | None = None
    """Numbers of extra steps whose averages are scored, of a run of `average`, all or these, each
    into a folder of its own in `run.folder`, with the bare backbone beside them; null: the last."""
    soup: SoupConfig = field(default_factory=SoupConfig)
    """How similar tasks are found, for routing soup."""
    arrow: ArrowConfig = field(default_factory=ArrowConfig)
    """How many LoRAs a token takes, for routing arrow."""
    tasks: EvalTasksConfig
    """The tasks; their test rows count, or their held-out rows where there are none."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How answers are obtained and scored."""
    run: PlainRunConfig
    """Where to write; the same command continues an interrupted run."""

    def __post_init__(self) -> None:
        if (self.adapter is None) == (self.backbone is None):
            raise ConfigError("give an adapter, which brings its backbone, or a bare backbone")
        if self.backbone_moved_to is not None and self.adapter is None:
            raise ConfigError("backbone_moved_to: only an adapter's backbone can have moved")
        if self.backbone_quantise is not None and self.adapter is None:
            raise ConfigError("backbone_quantise: of a bare backbone, set backbone.quantise")
        if self.routing == "soup" and self.adapter is None:
            raise ConfigError("routing: soup averages the private adapters of a run; name it")
        if self.routing == "arrow" and self.adapter is None:
            raise ConfigError("routing: arrow chooses among a library's LoRAs; name it as adapter")
        if self.routing == "off" and self.adapter is None:
            raise ConfigError("routing: off leaves out an adapter, and there is none; leave it out")
        if self.extra_steps is not None and (self.adapter is None or self.routing != "own"):
            raise ConfigError("extra_steps: name a run of average as adapter, under routing: own")
        if self.extra_steps == ():
            raise ConfigError("extra_steps: [] names none; give numbers, all or null")
