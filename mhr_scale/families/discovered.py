"""Families whose blocks and linears are found in the module that a configuration gives.

The module is built once on the meta device. Its blocks are those that transformers recomputes one
by one; their linears are told apart by name (`linear_names`). A linear that only some blocks have
is left alone, as is the feed-forward of a mixture of experts.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mhr_scale.errors import BackboneError, LayoutError, did_you_mean, first_line
from mhr_scale.families.family import LAYOUTS, Blocks, Family, Position
from mhr_scale.families.linear_modules import find_widths
from mhr_scale.families.linear_names import (
    PARTS,
    in_layout,
    in_order,
    is_complete,
    is_of_experts,
    part_of,
)
from mhr_scale.families.named import likeliest_depth

#: Where transformers keeps the blocks of a language model, and the number of one.
BLOCKS = re.compile(
    r"(?P<list>(?:model|transformer|gpt_neox)\.(?:(?P<stack>encoder|decoder)\.)?(?:layers|h|blocks))"
    r"\.(?P<block>\d+)\."
)
#: The stack of blocks that is not called encoder.
DECODER = "decoder"
#: Fields of a configuration that say nothing of the model's computation.
OUTSIDE = frozenset({"architectures", "transformers_version", "torch_dtype", "dtype", "model_type"})


class Found:
    """What a configuration's module has: it lies on the meta device, nothing in it is tied."""

    def __init__(self, family: "Discovered", config: Any) -> None:
        with torch.device("meta"):
            self.model: Any = family.build(config)

    @cached_property
    def blocks(self) -> dict[str, Blocks]:
        """The blocks by stack; raises `LayoutError` if there are none that are known."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        found = {}
        for name, listed in self.model.named_modules():
            is_list = isinstance(listed, nn.ModuleList) and len(listed) > 0
            if is_list and all(isinstance(block, GradientCheckpointingLayer) for block in listed):
                match = BLOCKS.match(f"{name}.0.")
                if match is None:
                    raise self._refusal(f"its blocks are called {name}")
                found[match["stack"] or DECODER] = _blocks_in(name, list(listed))
        if not found:
            raise self._refusal("it has no list of blocks")
        for blocks in found.values():
            if not blocks.sublayers[0]:
                raise self._refusal("not every block has attention with linears")
        return found

    def _refusal(self, why: str) -> LayoutError:
        kind = type(self.model).__name__
        return LayoutError(
            f"backbones of type '{self.model.config.model_type}' ({kind}) cannot be adapted: "
            f"{why}; use one whose blocks are of attention and feed-forwards, such as llama"
        )

    @cached_property
    def widths(self) -> dict[str, tuple[int, int]]:
        """The (in, out) widths of every linear in the blocks, by whole name."""
        names = (name for blocks in self.blocks.values() for name in blocks.list_linears())
        widths = {name: find_widths(self.model.get_submodule(name)) for name in names}
        return {name: pair for name, pair in widths.items() if pair is not None}

    @property
    def learns_positions(self) -> bool:
        """Whether positions are looked up in a table, as tokens are."""
        words = self.model.get_input_embeddings()
        tables = (part for part in self.model.modules() if isinstance(part, nn.Embedding))
        return any(table is not words for table in tables)

    def name_of(self, module: nn.Module | None) -> str:
        """The name of a module's weight; empty if there is none."""
        names = (name for name, other in self.model.named_modules() if other is module)
        return f"{next(names)}.weight" if module is not None else ""


def _blocks_in(name: str, blocks: Sequence[nn.Module]) -> Blocks:
    """The linears that every block of a list has, and those that are frozen for good."""
    adaptable: list[set[str]] = []
    frozen: dict[str, None] = {}
    for block in blocks:
        linears = [n for n, module in block.named_modules() if find_widths(module) is not None]
        experts = [n for n, _ in block.named_parameters() if is_of_experts(n)]
        own = [
            n
            for n in linears
            if not (is_of_experts(n) or (experts and part_of(n) == "feed_forward"))
        ]
        frozen |= dict.fromkeys(n for n in [*linears, *experts] if n not in own)
        adaptable.append(set(own))
    shared = in_order(set.intersection(*adaptable))
    sublayers = tuple(tuple(n for n in shared if part_of(n) == part) for part in PARTS)
    return Blocks(name=name, count=len(blocks), sublayers=sublayers, frozen=tuple(frozen))


_FOUND: dict[tuple[str, str], Found] = {}


def find(family: "Discovered", config: Any) -> Found:
    """The module of a configuration; built once for equal ones."""
    key = (type(config).__name__, config.to_json_string(use_diff=False))
    if key not in _FOUND:
        if len(_FOUND) >= 8:
            _FOUND.pop(next(iter(_FOUND)))
        _FOUND[key] = Found(family, copy.deepcopy(config))
    return _FOUND[key]


@dataclass(frozen=True, kw_only=True)
class Discovered(Family):
    """A family of all models of one form, whatever their linears are called."""

    peft_feed_forward: ClassVar[tuple[str, ...]] = ("down_proj", "fc2", "fc_out")
    default_fields: ClassVar[Mapping[str, Any]] = {
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }

    # -- configuration ---------------------------------------------------------------------------

    def make_config(self, fields: Mapping[str, Any]) -> Any:
        """transformers' configuration of a recipe's fields and their `model_type`."""
        kind = config_class(fields["model_type"])
        given = {name: value for name, value in fields.items() if name not in OUTSIDE}
        known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
        for name in sorted(set(given) - known):
            hint = did_you_mean(name, known)
            raise BackboneError(
                f"backbone.config: {fields['model_type']} has no setting '{name}'{hint}"
            )
        try:
            return kind(**given)
        except Exception as error:
            raise BackboneError(f"backbone.config: {first_line(error)}") from error

    def size_fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that the type has and that are set."""
        kind = config_class(raw["model_type"])
        known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
        known = (known - OUTSIDE) | {"model_type"}
        return {name: value for name, value in raw.items() if name in known}

    def width_of(self, raw: Mapping[str, Any]) -> int | None:
        """The width of the residual stream."""
        config = self._read(raw)
        return None if config is None else int(config.hidden_size)

    def linears_of(
        self, raw: Mapping[str, Any]
    ) -> tuple[Mapping[str, Blocks], Mapping[str, tuple[int, int]]] | None:
        """As the module has them that the config.json gives."""
        config = self._read(raw)
        if config is None:
            return None
        found = find(self, config)
        return found.blocks, found.widths

    def _read(self, raw: Mapping[str, Any]) -> Any:
        """The configuration that a config.json says; None if it says none of this family."""
        if not self.knows(str(raw.get("model_type"))):
            return None
        try:
            return config_class(raw["model_type"]).from_dict(dict(raw))
        except Exception:
            return None

    # -- blocks and linears ----------------------------------------------------------------------

    def in_layout(self, layout: str, blocks: Blocks) -> tuple[str, ...]:
        """By the roles of linears; raises `LayoutError` if none has a role of the layout's."""
        names = in_layout(layout, blocks.linears)
        if not names or not (blocks.is_whole or is_complete(layout, names)):
            raise LayoutError(
                f"adapter.layout: '{layout}': none of the linears {', '.join(blocks.linears)} is "
                f"known to be of it; list the names of those to adapt, or use "
                f"{' or '.join(other for other in LAYOUTS if other != layout)}"
            )
        return names

    def blocks(self, config: Any) -> dict[str, Blocks]:
        """As the module has them."""
        return find(self, config).blocks

    def blocks_of(self, names: Sequence[str]) -> dict[str, Blocks]:
        """The linears that are named, in as many blocks as fit best."""
        numbers: dict[str, set[int]] = {}
        linears: dict[str, set[str]] = {}
        lists: dict[str, str] = {}
        for name in names:
            match = BLOCKS.match(name)
            if match is not None:
                stack = match["stack"] or DECODER
                lists[stack] = match["list"]
                numbers.setdefault(stack, set()).add(int(match["block"]))
                linears.setdefault(stack, set()).add(name[match.end() :])
        found = {}
        for stack, name in lists.items():
            ordered = in_order(linears[stack])
            found[stack] = Blocks(
                name=name,
                count=likeliest_depth(numbers[stack]),
                sublayers=tuple(tuple(n for n in ordered if part_of(n) == part) for part in PARTS),
                is_whole=False,
            )
        return found

    def find_position(self, name: str) -> Position | None:
        """Where a linear sits, by its name."""
        match = BLOCKS.match(name)
        if match is None:
            return None
        part = PARTS.index(part_of(name[match.end() :]))
        return Position(match["stack"] or DECODER, int(match["block"]), part)

    def find_prefix(self, name: str) -> int | None:
        """Where the name of a block begins in a longer name; None if there is none in it."""
        match = BLOCKS.search(name)
        return None if match is None else match.start()

    def resize(self, config: Any, depths: Mapping[str, int]) -> Any:
        """The configuration with so many blocks; what it lists block by block is cut to them."""
        resized = copy.deepcopy(config)
        (count,) = depths.values()
        old = config.num_hidden_layers
        for name, value in list(vars(resized).items()):
            if isinstance(value, list | tuple) and len(value) == old:
                setattr(resized, name, type(value)(value[n % old] for n in range(count)))
        resized.num_hidden_layers = count
        return resized

    # -- the module ------------------------------------------------------------------------------

    def fill_buffers(self, model: nn.Module, config: Any) -> None:
        """Rotary frequencies and the like, in the data type that the module gives them.

        The model may have been cast since it was built, or built on the meta device.
        """
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            fresh = self.build(copy.deepcopy(config))
        for name, buffer in fresh.named_buffers():
            place, _, last = name.rpartition(".")
            module = model.get_submodule(place)
            setattr(module, last, buffer.to(module._buffers[last].device))  # type: ignore[union-attr]

    def find_ties(
        self, raw: Mapping[str, Any], names: frozenset[str], are_equal: Callable[[str, str], bool]
    ) -> dict[str, str]:
        """The head, where the configuration ties it and it is absent, or found to be equal."""
        config = self._read(raw)
        assert config is not None
        found = find(self, config)
        embedding = found.name_of(found.model.get_input_embeddings())
        head = found.name_of(found.model.get_output_embeddings())
        if not config.tie_word_embeddings or (head in names and not are_equal(head, embedding)):
            return {}
        return {head: embedding}

    def is_unused(self, name: str, config: Any) -> bool:
        """What transformers ignores: masks and frequencies that older versions stored."""
        patterns = find(self, config).model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def random_weight(
        self, config: Any, name: str, shape: tuple[int, ...], generator: torch.Generator
    ) -> Tensor:
        """A weight as the architecture's own rules initialise it."""
        model = find(self, config).model
        place, _, last = name.rpartition(".")
        shell = copy.copy(model.get_submodule(place))
        parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
        shell._parameters = {**shell._parameters, last: parameter}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(generator.initial_seed())
            model._init_weights(shell)
        return parameter.data


@lru_cache
def config_class(model_type: str) -> Any:
    """transformers' class of configurations of a model type."""
    from transformers import AutoConfig

    return type(AutoConfig.for_model(model_type))
