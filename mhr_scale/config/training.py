"""Loss, optimizer, schedule, batches and the run folder."""

from typing import Literal

from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part

#: Services that can get the lines of metrics.jsonl; the package extra `trackers` installs them.
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]

#: Where an input that is too long loses tokens.
Cut = Literal["left", "right", "middle"]

#: A month; longer values overflow the timers, which then do not wait at all.
LONGEST_TIMEOUT_SECONDS = 30 * 86400.0


def check_timeout(seconds: float) -> None:
    """Raise `ConfigError` for a timeout that collectives cannot have."""
    if not 0.0 < seconds <= LONGEST_TIMEOUT_SECONDS:
        raise ConfigError(
            f"run.timeout_seconds: {seconds:g} is not in (0, {LONGEST_TIMEOUT_SECONDS:g}]"
        )


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a tracker that is named twice."""
    for name in set(names):
        if names.count(name) > 1:
            raise ConfigError(f"run.trackers: '{name}' stands twice")


def check_betas(beta1: float, beta2: float) -> None:
    """Raise `ConfigError` for decays of moments outside [0, 1)."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ConfigError(f"optim.{name}: {beta} is not in [0, 1)")


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

    def __post_init__(self) -> None:
        for name in ("lr", "routing_lr", "weight_decay", "eps"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"optim.{name}: {getattr(self, name)} is below 0")
        check_betas(self.beta1, self.beta2)


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
    anneal_routing_steps: int = 0
    """Last steps in which routing is moved to uniform, so that the average loses less."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"schedule.steps: {self.steps} is not at least 1")
        if self.warmup_steps is not None and self.warmup_fraction:
            raise ConfigError("schedule: give warmup_steps or warmup_fraction, not both")
        if not 0 <= self.anneal_routing_steps <= self.steps:
            raise ConfigError(
                f"schedule.anneal_routing_steps: {self.anneal_routing_steps} is not in "
                f"0..{self.steps}"
            )
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
    """Rows per rank and forward pass, with packing on average; the rest is accumulated."""
    max_input_tokens: int = 256
    """Inputs are cut here; the share of cut rows is logged."""
    cut: Cut | None = None
    """Where over-long inputs lose tokens, but for a task's suffix and a chat template: on the left,
    on the right or in the middle; null: on the right for encoder-decoders, else on the left."""
    max_target_tokens: int = 256
    """Targets are cut here, the end-of-sequence token kept."""
    too_long: Literal["cut", "drop"] = "cut"
    """Whether over-long rows are cut or left out (and counted)."""
    pad_multiple: int = 8
    """Inputs are padded to a multiple of this many tokens; packed ones in attention alone."""
    packing: bool | None = None
    """Whether rows of a micro batch lie one behind another in one sequence, without padding, and
    micro batches have equally many tokens instead of rows; null: where the backbone's attention
    allows it."""
    workers: int = 0
    """Processes that prepare batches ahead; 0: the training process does it itself."""

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
        if self.workers < 0:
            raise ConfigError(f"batch.workers: {self.workers} is below 0")

    def accumulation(self, world_size: int) -> int:
        """Micro-steps per step on each of `world_size` ranks.

        Raises `ConfigError` if ranks times micro batch does not divide the batch.
        """
        rows = world_size * self.micro_batch_size
        if self.batch_size % rows:
            of_rank, rest = divmod(self.batch_size, world_size)
            other = "" if rest else f" or a micro_batch_size that divides {of_rank}"
            raise ConfigError(
                f"batch.batch_size: {self.batch_size} rows do not divide into micro batches of "
                f"{self.micro_batch_size} on {world_size} rank(s); use a multiple of {rows}{other}"
            )
        return self.batch_size // rows


@part
class PlainRunConfig:
    """Where a verb that trains nothing writes, and under which DeepSpeed file it runs."""

    folder: str
    """The run folder."""
    ds_config: str | None = None
    """DeepSpeed file, or the name of one in ds_configs/ (zero3): placement; null: replicated."""
    timeout_seconds: float = 1800.0
    """How long a collective may wait for the other ranks."""
    deterministic: bool = False
    """Whether operations run in deterministic forms only: on GPUs the same command then gives the
    same bits, more slowly; on CPUs it does anyway."""

    def __post_init__(self) -> None:
        check_timeout(self.timeout_seconds)


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
    keep_best: bool = True
    """Keep the saved step with the lowest validation loss too, of those validated as they were
    saved."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 0
    """Steps between validations (0: at the start and at the end only; -1: never)."""
    ds_config: str | None = None
    """DeepSpeed file, or the name of one in ds_configs/ (zero3): placement; null: replicated."""
    timeout_seconds: float = 1800.0
    """How long a collective may wait for the other ranks."""
    deterministic: bool = False
    """Whether operations run in deterministic forms only: on GPUs the same command then gives the
    same bits, more slowly; on CPUs it does anyway."""
    token_cache: str | None = None
    """Folder that keeps tokenised tasks between runs; null: tokenise at every start, once a
    machine."""
    trackers: tuple[TrackerName, ...] = ()
    """Services that get the lines of metrics.jsonl too: tensorboard (in the run folder), wandb,
    trackio, mlflow (in the run folder without MLFLOW_TRACKING_URI)."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"run.keep: {self.keep} is not at least 1")
        if self.log_every < 1:
            raise ConfigError(f"run.log_every: {self.log_every} is not at least 1")
        check_trackers(self.trackers)
        check_timeout(self.timeout_seconds)
