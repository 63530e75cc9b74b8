"""What is the model: the frozen backbone and the adapter."""

from typing import Any, Literal

from mhr_scale.config.part import part
from mhr_scale.errors import ConfigError

#: Ranks, skills and splits that no backbone is wide enough for are mistakes.
LARGEST_SIZE = 1 << 20

Policy = Literal["learned", "noisy", "straight_through", "uniform", "random", "fixed"]


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
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Frozen linears in 8 or 4 bits (bitsandbytes); replicated placements only."""
    dropout: float | None = 0.0
    """Dropout of the backbone while training; null keeps the rate of its configuration."""
    recompute: Literal["none", "reentrant", "non_reentrant"] = "none"
    """Activation checkpointing; `reentrant` gathers less under ZeRO-3, and keeps less with int8."""
    fused_attention: bool = True
    """Merge attention bias and mask once per stack, and run q, k and v together."""
    fused_gelu: bool = True
    """Gated tanh-gelu as one operation that keeps less."""
    fused_norm: bool = True
    """T5's norm as one operation; in bfloat16 it rounds once instead of twice."""

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
    """How mixing weights come from routing logits."""
    private: bool = False
    """Whether each task has an inventory of its own: what AdapterSoup averages."""
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
            if getattr(self, name) > LARGEST_SIZE:
                raise ConfigError(
                    f"adapter.{name}: {getattr(self, name)} is above {LARGEST_SIZE}, as no "
                    "backbone is wide"
                )
        if self.n_splits > 1 and self.n_skills == 1:
            raise ConfigError("adapter.n_splits: splits route between skills; set n_skills above 1")
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
        """Whether mixing weights exist at all (more than one skill)."""
        return self.n_skills > 1

    @property
    def has_logits(self) -> bool:
        """Whether a table of routing logits exists."""
        return self.is_routed and self.policy not in ("uniform", "random")

    @property
    def method(self) -> str:
        """The name this setting has in tables."""
        if self.private:
            return "private"
        if not self.is_routed:
            return "LoRA" if self.kind == "lora" else "(IA)3"
        if self.policy == "random":
            return "Random"
        family = "Poly" if self.n_splits == 1 else "MHR"
        return family if self.kind == "lora" else f"{family}-(IA)3"


@part
class SoupConfig:
    """Which private adapters an AdapterSoup averages: those of the most similar tasks."""

    adapters: int = 5
    """Number of adapters averaged (unknown in the paper; 5 in Chronopoulou et al. 2023)."""
    encoder: str | None = None
    """Hub id or folder of a sentence encoder; null: the frozen backbone's own encoder."""
    examples: int = 100
    """Training examples embedded per task at most."""

    def __post_init__(self) -> None:
        for name in ("adapters", "examples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"soup.{name}: {getattr(self, name)} is not at least 1")
