"""The frozen backbone, soups of private adapters, and tokens that choose among them."""

from collections.abc import Mapping
from typing import Any, Literal

from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part
from mhr_scale.run import repositories


def check_dropout(rate: float | None) -> None:
    """Raise `ConfigError` for a rate that is none."""
    if rate is not None and not 0.0 <= rate < 1.0:
        raise ConfigError(f"backbone.dropout: {rate} is not in [0, 1)")


def take_revision(part: Any, *, name: str) -> None:
    """Move the revision in a part's name, as in `owner/name@revision:folder`, to its own field.

    A folder here that is called so stays as it is. Raises `ConfigError` if both say one.
    """
    rest, revision = repositories.split(part.name or "")
    if revision is None:
        return
    if part.revision not in (None, revision):
        raise ConfigError(
            f"{name}.revision: {part.revision}, but {name}.name says {revision}; give one of them"
        )
    object.__setattr__(part, "name", rest)  # parts are frozen once they are made
    object.__setattr__(part, "revision", revision)


@part
class BackboneConfig:
    """The frozen backbone."""

    name: str | None = None
    """Hub id (`owner/name@revision:folder`, the last two as needed), local folder, or
    `builtin:toy`. Without it, `config` gives random weights."""
    revision: str | None = None
    """Hub revision (branch, tag or commit), if the name does not say it."""
    config: dict[str, Any] | None = None
    """Fields of transformers' configuration for random weights, its `model_type` among them
    (default: t5); used only where `name` is absent."""
    config_seed: int = 0
    """Seed of the random weights."""
    tokenizer: str | None = None
    """Hub id (as in `name`), folder, or `byt5`; default: the backbone's own, `byt5` for random
    weights."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen weights and of the computation; adapters stay float32."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Frozen linears in 8 or 4 bits (bitsandbytes); replicated placements only. none: as they are
    stored, for a folder may hold them quantised (`quantise` of `convert`), which starts at once."""
    mapped: bool = True
    """On a CPU, use replicated weights where they lie in their files, if those hold them in
    `dtype`: no copy is made, and all processes of a machine share the system's cache of the files.
    `false` copies them into every process."""
    dropout: float | None = 0.0
    """Dropout of the backbone while training; null keeps the rate of its configuration."""
    recompute: Literal["none", "reentrant", "non_reentrant"] = "none"
    """Activation checkpointing; `reentrant` gathers less under ZeRO-3, and keeps less with int8."""
    compile: bool = False
    """Run each block as one graph of torch.compile: whole weights in replicated placements only.
    Off until a GPU says what it gains; a graph takes from seconds to a minute to be made, and is
    made anew where rows laid flat need another number of rectangles (docs/method.md 16)."""
    fused_attention: bool = True
    """Run q, k and v together, and attention's parts with less copied (masks, shared heads)."""
    fused_gate: bool = True
    """A feed-forward's gated activation (silu, gelu) as one operation that keeps less."""
    fused_norm: bool = True
    """RMS norms as one operation that keeps less; in bfloat16 it rounds once instead of twice."""

    def __post_init__(self) -> None:
        if self.name is None and self.config is None:
            raise ConfigError("backbone: give a name (hub id or folder) or a config")
        take_revision(self, name="backbone")
        check_dropout(self.dropout)


@part
class SoupConfig:
    """Which private adapters an AdapterSoup averages: those of the most similar tasks."""

    adapters: int = 5
    """Number of adapters averaged (unknown in the paper; 5 in Chronopoulou et al. 2023)."""
    encoder: str | None = None
    """Hub id or folder of a sentence encoder; null: the frozen backbone's own encoder."""
    examples: int = 100
    """Training examples embedded per task at most."""
    tasks: dict[str, Any] | None = None
    """Settings of the training tasks that are others here, such as `folder`, if they have moved or
    are relative to another folder than the current one."""

    def __post_init__(self) -> None:
        for name in ("adapters", "examples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"soup.{name}: {getattr(self, name)} is not at least 1")


@part
class ArrowConfig:
    """How tokens choose among the LoRAs of a library (docs/method.md 18)."""

    top_k: int = 4
    """LoRAs that a token takes of all, those whose directions it lies along most."""
    temperature: float = 1.0
    """Of the softmax over their scores."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"arrow.top_k: {self.top_k} is not at least 1")
        if not self.temperature > 0.0:
            raise ConfigError(f"arrow.temperature: {self.temperature} is not above 0")


def precision_of(facts: Mapping[str, Any]) -> str:
    """How a backbone of these facts computes: its data type, quantised or not; empty: unknown."""
    kinds = [str(facts[name]) for name in ("quantise", "dtype") if facts.get(name)]
    return " and ".join(kind for kind in kinds if kind != "none")
