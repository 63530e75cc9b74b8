"""What a recipe may say: one frozen dataclass per question, plain Python, no dependency.

Parts answer *what is the model* (`BackboneConfig`, `AdapterConfig`), *what is the data* (a tasks
part per suite, `MixtureConfig`), *how do we train* (`LossConfig`, `OptimConfig`, `ScheduleConfig`,
`BatchConfig`) and *where do we write* (`RunConfig`). Derived numbers are methods, never fields.
`recipe.py` reads them from YAML. The text under a field is its help text.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from typing_extensions import dataclass_transform

from mhr_scale.errors import ConfigError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def part(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that refuses unknown fields when a recipe is read."""
    made = dataclass(frozen=True, kw_only=True, slots=True)(cls)
    made.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return made


Policy = Literal["learned", "noisy", "straight_through", "uniform", "random", "fixed", "private"]


@part
class BackboneConfig:
    """The frozen encoder-decoder."""

    name: str | None = None
    """Hub id, local folder, or `builtin:toy`. Without it, `config` gives random weights."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    config: dict[str, Any] | None = None
    """Fields of transformers' T5Config for random weights; used only where `name` is absent."""
    config_seed: int = 0
    """Seed of the random weights."""
    tokenizer: str | None = None
    """Hub id, folder, or `byt5`; default: the backbone's own, `byt5` for random weights."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen weights and of the computation; adapters stay float32."""
    dropout: float | None = 0.0
    """Dropout of the backbone while training; null keeps the rate of its configuration."""
    recompute: Literal["none", "reentrant", "non_reentrant"] = "none"
    """Activation checkpointing; `reentrant` gathers less under ZeRO-3."""

    def __post_init__(self) -> None:
        if self.name is None and self.config is None:
            raise ConfigError("backbone: give a name (hub id or folder) or a config")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"backbone.dropout: {self.dropout} is not in [0, 1)")


@part
class AdapterConfig:
    """The adapter: which linears, how many skills, how routing mixes them.

    `n_skills: 1` is plain LoRA; `n_skills > 1` with `n_splits: 1` is Poly, with more splits MHR.
    """

    kind: Literal["lora", "ia3"] = "lora"
    """A low-rank pair per skill, or an (IA)3 scaling vector per skill."""
    layout: str = "full"
    """Which linears are adapted: full, light or attention."""
    rank: int = 1
    """Low rank R of one skill; ignored by ia3, which has none."""
    alpha: float = 1.0
    """The adapter's output is scaled by alpha / rank."""
    n_skills: int = 8
    """Skills S in the inventory of each adapted linear."""
    n_splits: int = 1
    """Blocks Q of each linear's width with a routing of their own (1 = Poly, more = MHR)."""
    granularity: Literal["linear", "sublayer", "block", "blocks", "stack", "model"] = "linear"
    """Which linears share one routing table; `blocks` = every `block_span` blocks."""
    block_span: int = 1
    """Number of consecutive blocks that share a routing table under granularity `blocks`."""
    policy: Policy = "learned"
    """How mixing weights come from routing logits; `private` gives each task a pair of its own."""
    temperature: float = 1.0
    """Temperature of the relaxed Bernoulli noise of policy `noisy`."""
    random_probability: float = 0.5
    """Probability that policy `random` switches a skill on for a row."""
    random_empty: Literal["off", "uniform"] = "off"
    """What a row without any skill gets under policy `random`: no adapter, or the mean."""

    def __post_init__(self) -> None:
        for name in ("rank", "n_skills", "n_splits", "block_span"):
            if getattr(self, name) < 1:
                raise ConfigError(f"adapter.{name}: {getattr(self, name)} is not at least 1")
        if self.n_splits > 1 and self.n_skills == 1 and self.policy != "private":
            raise ConfigError("adapter.n_splits: splits route between skills; set n_skills above 1")
        if self.policy == "private" and (self.n_skills != 1 or self.n_splits != 1):
            raise ConfigError(
                "adapter.policy: private keeps one pair per task; set n_skills and n_splits to 1"
            )
        if self.block_span > 1 and self.granularity != "blocks":
            raise ConfigError("adapter.block_span: only granularity 'blocks' reads it")
        if self.temperature <= 0.0:
            raise ConfigError(f"adapter.temperature: {self.temperature} is not above 0")
        if not 0.0 < self.random_probability < 1.0:
            raise ConfigError(
                f"adapter.random_probability: {self.random_probability} is not in (0, 1)"
            )

    @property
    def scale(self) -> float:
        """Factor alpha / rank on the adapter's output."""
        return self.alpha / self.rank

    @property
    def is_routed(self) -> bool:
        """Whether mixing weights exist at all (more than one skill, none of them private)."""
        return self.n_skills > 1 and self.policy != "private"

    @property
    def has_logits(self) -> bool:
        """Whether a table of routing logits exists."""
        return self.is_routed and self.policy not in ("uniform", "random")

    @property
    def method(self) -> str:
        """The name this setting has in tables."""
        if self.policy == "private":
            return "private"
        if not self.is_routed:
            return "LoRA" if self.kind == "lora" else "(IA)3"
        if self.policy == "random":
            return "Random"
        family = "Poly" if self.n_splits == 1 else "MHR"
        return family if self.kind == "lora" else f"{family}-(IA)3"


@part
class IntakeConfig:
    """What readers do with rows they cannot use."""

    on_bad: Literal["reject", "error", "skip"] = "reject"
    """reject: write down, stop above max(10, 0.1 %); error: stop at the first; skip: never stop."""
    empty_target: Literal["reject", "keep"] = "reject"
    """Whether a row with an empty target is refused or trains the end-of-sequence token."""
    empty_input: Literal["reject", "keep"] = "reject"
    """Whether a row with an empty input is refused."""


@part
class ToyTasks:
    """The built-in compositional suite (list operation, symbol map, output format)."""

    suite: Literal["toy"]
    """Chooses this part."""
    n_tasks: int = 60
    """Training tasks drawn from the 144 compositions, the 10 held-out ones excluded."""
    train_examples: int = 200
    """Training examples per task."""
    validation_examples: int = 20
    """Held-out examples per training task."""
    instruction: Literal["none", "full"] = "none"
    """none: the input does not tell the task; full: three instruction tokens do."""
    seed: int = 0
    """Seed of the task split and of the examples."""


@part
class SuperNITasks:
    """Super-NaturalInstructions: a folder with `tasks/*.json` and `splits/<split>/`."""

    suite: Literal["superni"]
    """Chooses this part."""
    folder: str
    """Folder that holds `tasks/` and `splits/`."""
    split: str = "default"
    """Sub-folder of `splits/` whose `train_tasks.txt` or `test_tasks.txt` is read."""
    fold: Literal["train", "test"] = "train"
    """Which task list of the split."""
    tasks: tuple[str, ...] = ()
    """Only these tasks of the list; empty = all."""
    missing: Literal["error", "skip"] = "error"
    """What a listed task without a file does."""
    train_examples: int = 100
    """Training instances per task."""
    validation_examples: int = 100
    """Validation instances per task, disjoint from the training ones."""
    test_examples: int = 100
    """Test instances of a `test` task: its first ones, the same for every seed."""
    positive_examples: int = 0
    """Positive examples in the prompt (0-2)."""
    prompt: Literal["tk_instruct", "mhr", "mhr_name"] = "mhr"
    """Prompt wording: Tk-Instruct's, MHR's (R2), or MHR's earlier one with the task name (R1)."""
    references: Literal["random", "first", "all"] = "random"
    """Training target of a many-reference row: one drawn per access, the first, or a row each."""
    seed: int = 42
    """Seed of the split into training and validation instances."""
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    """Policy for unusable rows."""

    def __post_init__(self) -> None:
        if not 0 <= self.positive_examples <= 2:
            raise ConfigError(f"tasks.positive_examples: {self.positive_examples} is not in 0..2")


@part
class JsonlTasks:
    """The user's own rows: one JSONL file per task and fold, or per fold with a `task` field."""

    suite: Literal["jsonl"]
    """Chooses this part."""
    folder: str
    """Folder with the JSONL files, and optionally `tasks.yaml` (cap, weight, metric per task)."""
    validation_examples: int = 100
    """Rows per task set aside where no `validation.jsonl` exists (at most a tenth of the task)."""
    seed: int = 42
    """Seed of that choice."""
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    """Policy for unusable rows."""


@part
class T0Tasks:
    """The T0 training mixture from P3."""

    suite: Literal["t0"]
    """Chooses this part."""
    source: str = "bigscience/P3"
    """Hub id or local folder of P3."""
    mixture: Literal["T0", "T0+", "T0++"] = "T0"
    """Which training mixture."""
    unit: Literal["prompt", "dataset"] = "prompt"
    """Whether a task is one prompt (313 tasks) or one data set (38)."""


TasksConfig = ToyTasks | SuperNITasks | JsonlTasks | T0Tasks


@part
class MixtureConfig:
    """How tasks share the stream of samples."""

    cap: int | None = None
    """Rows of a task that count in one epoch; a task's own `cap` is stronger."""
    temperature: float = 1.0
    """Shares are (capped size) ** (1 / temperature)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Fixed relative weights by task name; a task without one keeps its share."""
    first_rows: bool = False
    """Repeat a capped task's first rows every epoch instead of walking on through the task."""
    group: int = 1
    """Consecutive samples of one task per draw (MHR mixes distinct tasks only: 4 means fewer)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0.0:
            raise ConfigError(f"mixture.temperature: {self.temperature} is not above 0")
        if self.group < 1:
            raise ConfigError(f"mixture.group: {self.group} is not at least 1")
        if self.cap is not None and self.cap < 1:
            raise ConfigError(f"mixture.cap: {self.cap} is not at least 1")


@part
class LossConfig:
    """Cross-entropy of the target tokens."""

    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary."""
    normalise: Literal["tokens", "examples"] = "tokens"
    """Divide the summed loss by the global number of target tokens (T0) or examples (SuperNI)."""


@part
class OptimConfig:
    """The optimizer of inventory and routing."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    """Adafactor (factored per adapted linear, no momentum) or AdamW."""
    lr: float = 1e-3
    """Peak learning rate of the inventory."""
    routing_lr: float = 0.1
    """Peak learning rate of the routing logits."""
    scale_parameter: bool = False
    """Adafactor: multiply the rate by max(1e-3, RMS of the tensor)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the inventory (never of routing)."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.999
    """AdamW's second-moment decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; null switches clipping off."""


@part
class ScheduleConfig:
    """Length of the run and shape of the learning rate."""

    steps: int
    """Optimizer steps."""
    warmup_steps: int | None = None
    """Linear warm-up from 0, in steps; excludes `warmup_fraction`."""
    warmup_fraction: float = 0.0
    """Linear warm-up from 0, as a share of `steps`."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 after the warm-up, or none."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"schedule.steps: {self.steps} is not at least 1")
        if self.warmup_steps is not None and self.warmup_fraction:
            raise ConfigError("schedule: give warmup_steps or warmup_fraction, not both")
        if not 0.0 <= self.warmup_fraction <= 1.0:
            raise ConfigError(f"schedule.warmup_fraction: {self.warmup_fraction} is not in [0, 1]")

    @property
    def warmup(self) -> int:
        """Warm-up length in steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return int(self.warmup_fraction * self.steps)


@part
class BatchConfig:
    """Rows per step and tokens per row."""

    batch_size: int = 16
    """Rows per optimizer step over all ranks."""
    micro_batch_size: int = 4
    """Rows per rank and forward pass; the rest is accumulated."""
    max_input_tokens: int = 256
    """Inputs are cut here; the share of cut rows is logged."""
    max_target_tokens: int = 256
    """Targets are cut here, the end-of-sequence token kept."""
    too_long: Literal["cut", "drop"] = "cut"
    """Whether over-long rows are cut or left out (and counted)."""
    pad_multiple: int = 8
    """Inputs are padded to a multiple of this many tokens."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "micro_batch_size",
            "max_input_tokens",
            "max_target_tokens",
            "pad_multiple",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch.{name}: {getattr(self, name)} is not at least 1")

    def accumulation(self, world_size: int) -> int:
        """Micro-steps per step on each of `world_size` ranks.

        Raises `ConfigError` if ranks times micro batch does not divide the batch.
        """
        rows = world_size * self.micro_batch_size
        if self.batch_size % rows:
            raise ConfigError(
                f"batch.batch_size: {self.batch_size} rows do not divide into micro batches of "
                f"{self.micro_batch_size} on {world_size} rank(s); use a multiple of {rows} or a "
                f"micro_batch_size that divides {self.batch_size / world_size:g}"
            )
        return self.batch_size // rows


@part
class RunConfig:
    """Where a run writes, how often, and under which DeepSpeed file."""

    folder: str
    """The run folder; the same command continues what it finds there."""
    seed: int = 42
    """Seed of initialisation, sample order and routing noise."""
    save_every: int = 0
    """Save every so many steps (0: only at the end)."""
    keep: int = 3
    """Number of saved steps to keep."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 0
    """Steps between validations (0: at the start and at the end only; -1: never)."""
    ds_config: str | None = None
    """DeepSpeed file: placement and communication of the backbone; null: replicated."""
    timeout_seconds: float = 1800.0
    """How long a collective may wait for the other ranks."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"run.keep: {self.keep} is not at least 1")
        if self.log_every < 1:
            raise ConfigError(f"run.log_every: {self.log_every} is not at least 1")


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
