"""What differs between backbones: the questions that one object per family answers.

Nothing outside this room names a model type, a class or a module of one architecture, or asks
whether a backbone has an encoder. Two forms cover all: encoder-decoder (`encoder_decoder`) and
decoder-only (`causal`). Blocks are known by name (`t5`) or found in the module (`discovered`). A
family is stateless; a model's configuration is handed to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mhr_scale.errors import BackboneError
from mhr_scale.families.packed import PAD_MULTIPLE, EncodedRow, Packed, Targets
from mhr_scale.families.stored_names import AS_NAMED, Arrangement

Side = Literal["input", "target"]
#: Layouts that every family has: all linears of the blocks; keys, values and what is multiplied by
#: the feed-forward's gate; all of attention.
LAYOUTS = ("full", "light", "attention")


class Settings(Protocol):
    """What of a backbone's settings a family reads (`BackboneConfig`)."""

    @property
    def fused_attention(self) -> bool:
        """Whether attention runs q, k and v together and copies less."""

    @property
    def fused_gate(self) -> bool:
        """Whether a gated activation is one operation that keeps less."""

    @property
    def fused_norm(self) -> bool:
        """Whether an RMS norm is one operation that keeps less."""


class Position(NamedTuple):
    """Where a linear sits: its stack, block and sub-layer."""

    stack: str
    block: int
    sublayer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The blocks of one stack: the module that lists them, their number, and what lies in each.

    `sublayers` are the linears of each sub-layer by their names below the block, in the order in
    which adapters list them. `frozen` are names of linears, or of modules with weights of linears,
    that no adapter can be attached to: experts.
    """

    name: str
    count: int
    sublayers: tuple[tuple[str, ...], ...]
    frozen: tuple[str, ...] = ()
    is_whole: bool = True
    """Whether the blocks have no other linears; linears that come by name are those that are named.
    """

    @property
    def linears(self) -> tuple[str, ...]:
        """Names below the block of all linears that adapters can be attached to."""
        return tuple(linear for linears in self.sublayers for linear in linears)

    def list_linears(
        self, linears: Collection[str] | None = None, numbers: Collection[int] | None = None
    ) -> list[str]:
        """Whole names of these linears (all) in the blocks of these numbers (all), in order."""
        return [
            f"{self.name}.{number}.{linear}"
            for number in range(self.count)
            for linear in self.linears
            if (linears is None or linear in linears) and (numbers is None or number in numbers)
        ]

    def list_modules(self) -> list[str]:
        """Names of the blocks themselves."""
        return [f"{self.name}.{number}" for number in range(self.count)]


def last_part(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """Everything in which backbones of one family differ from others.

    `inputs` maps the last name parts of those linears that do not read the backbone's width to the
    one whose outputs they read. `abbreviations` are patterns of names with what stands for them in
    pictures.
    """

    name: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    abbreviations: tuple[tuple[str, str], ...] = ()

    peft_task_type: ClassVar[str]
    """What PEFT calls the form."""
    has_servers: ClassVar[bool] = False
    """Whether servers of many LoRAs (vLLM, LoRAX) take those of this form."""
    auto_class: ClassVar[str]
    """transformers' class that loads a model of this form by its configuration."""
    peft_feed_forward: ClassVar[tuple[str, ...]] = ()
    """Linears whose inputs PEFT's IA3 scales where its configuration does not say which."""
    default_fields: ClassVar[Mapping[str, Any]] = {}
    """Fields of a configuration that a recipe may leave out."""
    default_tokenizer: ClassVar[str] = "byt5"
    """The tokenizer of random weights."""
    special_tokens: ClassVar[tuple[str, ...]] = ("pad_token", "eos_token")
    """Tokens that a tokenizer has to have, the same as its backbone."""
    cut_side: ClassVar[Literal["left", "right"]] = "right"
    """Where an input that is too long loses tokens, if a recipe does not say."""
    shares_prompts: ClassVar[bool] = False
    """Whether `pack_shared` can be: rows laid flat may have the beginning of prompts in common."""

    # -- configuration ---------------------------------------------------------------------------

    @abstractmethod
    def knows(self, model_type: str) -> bool:
        """Whether models of this type are of the family, or of a sibling that reads them too."""

    @abstractmethod
    def list_types(self) -> Sequence[str]:
        """The model types of the family that users know, for messages."""

    def matches(self, config: Any) -> bool:
        """Whether a configuration is one of this family."""
        return self.knows(config.model_type)

    @abstractmethod
    def make_config(self, fields: Mapping[str, Any]) -> Any:
        """A configuration of a recipe's fields; raises `BackboneError` if no model has them."""

    @abstractmethod
    def check_config(self, config: Any, place: str) -> None:
        """Raise `BackboneError` for sizes and settings that no model can have."""

    def own_config(self, config: Any, place: str) -> Any:
        """What of a folder's configuration the backbone is made from: of several models its own.

        Raises `BackboneError` if that is of no known type.
        """
        return config

    def own_fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The same of a config.json."""
        return dict(raw)

    def set_ends(self, config: Any, generation: Mapping[str, Any], place: str) -> None:  # noqa: B027
        """Add the ends of sequence that a generation_config.json says to the configuration.

        Raises `BackboneError` for ends that are no tokens.
        """

    def required_fields(self, config: Any) -> dict[str, Any]:
        """Settings that a model cannot do without and that folders may leave out, with values."""
        return {}

    def size_fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What of a config.json a model without weights is made from."""
        return dict(raw)

    def width_of(self, raw: Mapping[str, Any]) -> int | None:
        """The backbone's width, as a config.json has it."""
        return None

    def is_of(self, raw: Mapping[str, Any]) -> bool:
        """Whether a config.json that some family reads is of this one."""
        return True

    def linears_of(
        self, raw: Mapping[str, Any]
    ) -> tuple[Mapping[str, Blocks], Mapping[str, tuple[int, int]]] | None:
        """Blocks by stack, and the (in, out) widths of their linears by whole name.

        As a config.json has them; None if it does not say.
        """
        return None

    def most_positions(self, config: Any) -> tuple[int | None, bool]:
        """The positions of the longest text that a model was made for, None if it has no end.

        And whether a longer one cannot be read at all.
        """
        return None, False

    # -- blocks and linears ----------------------------------------------------------------------

    @abstractmethod
    def in_layout(self, layout: str, blocks: Blocks) -> tuple[str, ...]:
        """The linears of a stack's blocks that a layout of `LAYOUTS` adapts, by name below them."""

    def writer_of(
        self, linear: str, raw: Mapping[str, Any] | None, *, has_negative: bool
    ) -> str | None:
        """The linear whose outputs to scale is to scale what this one reads; None without one.

        `raw` is the config.json, if it is known; `has_negative` tells of the factors.
        """
        return None

    @abstractmethod
    def blocks(self, config: Any) -> dict[str, Blocks]:
        """The blocks of a model with this configuration, by stack."""

    @abstractmethod
    def blocks_of(self, names: Sequence[str]) -> dict[str, Blocks]:
        """The blocks that linears of these names imply, where there is no configuration."""

    @abstractmethod
    def find_position(self, name: str) -> Position | None:
        """Where the linear of this name sits, if it is one of the family's."""

    @abstractmethod
    def find_prefix(self, name: str) -> int | None:
        """Where, in a name that another program has prefixed, the name of a linear begins."""

    def is_in_block(self, name: str, config: Any) -> bool:
        """Whether a module or a parameter lies in a block."""
        return any(name.startswith(f"{blocks.name}.") for blocks in self.blocks(config).values())

    @abstractmethod
    def resize(self, config: Any, depths: Mapping[str, int]) -> Any:
        """The configuration with so many blocks per stack."""

    # -- the module ------------------------------------------------------------------------------

    @abstractmethod
    def model_class(self, config: Any) -> Any:
        """transformers' class, imported here: not where parameters are being sharded."""

    def build(self, config: Any) -> nn.Module:
        """The module on whatever device the context says, its weights unfilled, nothing tied."""
        from transformers import initialization

        with initialization.no_init_weights(), initialization.no_tie_weights():
            model: nn.Module = self.model_class(config)(config)
        return model

    def fill_buffers(self, model: nn.Module, config: Any) -> None:  # noqa: B027
        """Compute the buffers that no checkpoint holds, on the device where they lie."""

    def arrange(self, raw: Mapping[str, Any], names: frozenset[str]) -> Arrangement:
        """What a checkpoint with these names holds otherwise than the model has it.

        By a config.json and the names in the checkpoint. Raises `BackboneError` for what cannot be
        read as it lies.
        """
        return AS_NAMED

    @abstractmethod
    def find_ties(
        self, raw: Mapping[str, Any], names: frozenset[str], are_equal: Callable[[str, str], bool]
    ) -> dict[str, str]:
        """Names that stand for a tensor of another name.

        By a config.json, the names in a checkpoint, and whether two of its tensors are the same.
        """

    def tie(self, model: Any, ties: Mapping[str, str]) -> None:
        """Make the tied parameters one, and leave all others alone."""
        for name, target in ties.items():
            module, _, parameter = name.rpartition(".")
            setattr(model.get_submodule(module), parameter, model.get_parameter(target))

    @abstractmethod
    def random_weight(
        self, config: Any, name: str, shape: tuple[int, ...], generator: torch.Generator
    ) -> Tensor:
        """A weight by the architecture's own rules of initialisation, float32."""

    def fuse(self, model: nn.Module, settings: Settings) -> None:  # noqa: B027
        """Put faster parts in place, where the family has some; before adapters are attached."""

    def norms(self, model: nn.Module) -> list[nn.Module]:
        """The normalisations of a model."""
        return [part for part in model.modules() if type(part).__name__.endswith("Norm")]

    def embeddings(self, model: Any) -> list[nn.Module]:
        """The modules that turn token ids into states."""
        return [model.get_input_embeddings()]

    # -- rows ------------------------------------------------------------------------------------

    @abstractmethod
    def close(self, ids: list[int], side: Side, tokenizer: Any) -> list[int]:
        """Ids with the beginning and end of sequence that an input or a target has."""

    @abstractmethod
    def pack(
        self,
        rows: Sequence[EncodedRow],
        config: Any,
        *,
        pad_multiple: int = PAD_MULTIPLE,
        at_least: tuple[int, int] = (0, 0),
        is_flat: bool = False,
        token_multiple: int = 1,
    ) -> Packed:
        """Rows as the model takes them, on the host: padded, or laid flat if it can (`cannot_lay`).

        Inputs are padded to a multiple of `pad_multiple`; inputs and targets to the lengths
        `at_least`, or wider. Rows that are laid flat are padded to these in attention only; their
        sequences are filled up to a multiple of `token_multiple` tokens.
        """

    def pack_shared(self, rows: Sequence[EncodedRow], config: Any) -> Packed:
        """Rows laid flat, tokens that a task's prompts begin with alike once: without gradients.

        Raises `BackboneError` for a family that does not share them (`shares_prompts`).
        """
        raise BackboneError(f"{self.name}: prompts are not shared; use `pack`")

    # -- passes ----------------------------------------------------------------------------------

    def cannot_lay(self, model: Any) -> str | None:
        """Why rows cannot be laid flat for this model; None: they can."""
        return f"attention of {self.name} takes padded rows only"

    @abstractmethod
    def predictions(self, model: Any, packed: Packed) -> Tensor:
        """Logits of padded rows (B, D, V), or of the targets of rows laid flat (N, V).

        `packed.sources` tells where a target position finds its own. The model is called as a
        whole, never a part of it: PEFT may be wrapped around it.
        """

    def logits(self, model: Any, packed: Packed) -> Tensor:
        """Logits (B, D, V) at the target positions: those of `labels_BD`, aligned with it."""
        logits, sources = self.predictions(model, packed), packed.sources
        if sources is None:
            return logits
        if isinstance(sources, Targets):
            of_targets = logits if sources.sources_N is None else logits[sources.sources_N]
            spread = logits.new_zeros(packed.labels_BD.numel(), logits.shape[-1])
            return spread.index_copy(0, sources.places_N, of_targets).unflatten(
                0, packed.labels_BD.shape
            )
        return logits.gather(1, sources[..., None].expand(-1, -1, logits.shape[-1]))

    @abstractmethod
    def generate(
        self, model: Any, rows: Sequence[EncodedRow], *, device: torch.device, **options: Any
    ) -> list[list[int]]:
        """The ids of an answer to each row, new tokens only; `options` are those of `generate`."""

    @abstractmethod
    def states(self, model: Any, packed: Packed) -> tuple[Tensor, Tensor]:
        """Hidden states of the inputs (B, L, H) and their mask (B, L): for comparing tasks."""

    @abstractmethod
    def run_generation(self, model: Any, packed: Packed, *, beams: int, new_tokens: int) -> None:
        """The passes of a generation of `new_tokens` without asking a tensor's value.

        For counting on tensors that have none.
        """
