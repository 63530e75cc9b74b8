"""Settings of `convert`: which backbone, which data type, which folder."""

from dataclasses import field
from typing import Literal

from mhr_scale.config.model import take_revision
from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part, recipe


@part
class OriginConfig:
    """The backbone that is converted."""

    name: str
    """Hub id (`owner/name@revision:folder`, the last two as needed), local folder, or
    `builtin:toy`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit), if the name does not say it."""

    def __post_init__(self) -> None:
        take_revision(self, name="backbone")


@part
class FingerprintConfig:
    """The logits that are stored with the weights, for every later run to compare with."""

    prompts: tuple[str, ...] = ()
    """Texts whose logits are stored; none: fixed rows of token ids."""
    compare: bool = True
    """Compare them with those that transformers computes from the original."""

    def __post_init__(self) -> None:
        if any(not prompt.strip() for prompt in self.prompts):
            raise ConfigError("fingerprint.prompts: an empty text; give words or leave it out")


@recipe
class ConvertConfig:
    """Everything `convert` reads."""

    backbone: OriginConfig
    """The backbone that is converted: `.bin` or safetensors, whole or in shards."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the written weights, and of what `quantise` quantises."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Frozen linears in 8 or 4 bits, as bitsandbytes stores them: every verb then opens them as
    they are, for replicated placements only (`wo` of a T5 stays in `dtype`, as in transformers)."""
    folder: str
    """Where to write: a folder that is absent or empty."""
    max_shard_bytes: int = 5_000_000_000
    """Size of one file; a larger tensor has a file of its own."""
    fingerprint: FingerprintConfig = field(default_factory=FingerprintConfig)
    """What is stored to recognise the backbone by."""
    verify: bool = False
    """Check a `folder` that is there, every hash and the fingerprint, and write nothing."""

    def __post_init__(self) -> None:
        if self.max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes: {self.max_shard_bytes} is not at least 1")
