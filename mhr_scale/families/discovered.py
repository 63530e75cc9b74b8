"""Families whose blocks and linears are found in the module that a configuration gives.

The module is built once on the meta device. Its blocks are those that transformers recomputes one
by one; their linears are told apart by name (`linear_names`). A linear that only some blocks have
is left alone, as is the feed-forward of a mixture of experts.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mhr_scale.errors import BackboneError, LayoutError, first_line
from mhr_scale.families import composed, model_configs
from mhr_scale.families.family import LAYOUTS, Blocks, Family, Position, last_part
from mhr_scale.families.first_weights import make_weight
from mhr_scale.families.linear_modules import find_widths
from mhr_scale.families.linear_names import (
    PARTS,
    in_layout,
    in_order,
    is_complete,
    is_of_experts,
    part_of,
    role_of,
)
from mhr_scale.families.named import likeliest_depth
from mhr_scale.families.stored_names import Arrangement, map_names

#: Where transformers keeps the blocks of a language model, and the number of one.
BLOCKS = re.compile(
    r"(?P<list>(?:model|transformer|gpt_neox)\.(?:(?P<stack>encoder|decoder)\.)?(?:layers|h|blocks))"
    r"\.(?P<block>\d+)\."
)
#: The stack of blocks that is not called encoder.
DECODER = "decoder"

#: What configurations call the activation of feed-forwards.
ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "activation")


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

    @cached_property
    def stored_names(self) -> frozenset[str]:
        """Names of what a checkpoint holds."""
        return frozenset(self.model.state_dict())

    @property
    def stored_buffers(self) -> list[str]:
        """Those of them that are no weights."""
        return [name for name, _ in self.model.named_buffers() if name in self.stored_names]

    @cached_property
    def ties(self) -> dict[str, str]:
        """Parameters that transformers ties as the configuration says, and to what."""
        found: dict[str, str] = self.model.get_expanded_tied_weights_keys(all_submodels=True)
        return found

    def ignores(self, name: str) -> bool:
        """Whether a tensor is one that older versions had: masks, frequencies, positions."""
        if name in self.stored_names:
            return False
        buffers = [last_part(name) for name, _ in self.model.named_buffers()]
        patterns = set(self.model._keys_to_ignore_on_load_unexpected or ())
        if "inv_freq" in buffers:
            patterns.add(r"rotary_emb\.inv_freq")
        if "position_ids" in buffers:
            patterns.add(r"(^|\.)position_ids$")
        return any(re.search(pattern, name) for pattern in patterns)

    @property
    def learns_positions(self) -> bool:
        """Whether positions are looked up in a table, as tokens are."""
        words = self.model.get_input_embeddings()
        tables = (part for part in self.model.modules() if isinstance(part, nn.Embedding))
        return any(table is not words for table in tables)


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
    frozen |= dict.fromkeys(n for own in adaptable for n in sorted(own) if n not in shared)
    sublayers = tuple(tuple(n for n in shared if part_of(n) == part) for part in PARTS)
    return Blocks(name=name, count=len(blocks), sublayers=sublayers, frozen=tuple(frozen))


def _role(name: str) -> str | None:
    """What a linear of this whole name computes."""
    match = BLOCKS.match(name)
    return None if match is None else role_of(name[match.end() :])


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

    stacks: ClassVar[tuple[str, ...]] = (DECODER,)
    """Stacks whose blocks the family has."""
    peft_feed_forward: ClassVar[tuple[str, ...]] = (
        *("down_proj", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj"),
    )
    default_fields: ClassVar[Mapping[str, Any]] = {
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }

    # -- configuration ---------------------------------------------------------------------------

    def make_config(self, fields: Mapping[str, Any]) -> Any:
        """transformers' configuration of a recipe's fields and their `model_type`."""
        return model_configs.make_config(fields)

    def check_module(self, config: Any, place: str) -> None:
        """Raise `BackboneError` if nothing in the module of a configuration can be adapted."""
        try:
            found = find(self, config)
            _ = found.blocks
        except LayoutError as error:
            raise BackboneError(f"{place}: {first_line(error)}") from error
        except Exception as error:  # transformers checks little of what its modules are made from
            raise BackboneError(
                f"{place}: no {config.model_type} can be made of its settings "
                f"({type(error).__name__}: {first_line(error)}); correct them"
            ) from error
        if found.stored_buffers:
            raise BackboneError(
                f"{place}: checkpoints of a {config.model_type} hold {found.stored_buffers[0]}, "
                "which is no weight and is not read here; use a backbone without it"
            )

    def size_fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that the type has and that are set."""
        return model_configs.size_fields(self.own_fields(raw))

    def width_of(self, raw: Mapping[str, Any]) -> int | None:
        """The width of the residual stream."""
        config = self._read(raw)
        return None if config is None else int(config.hidden_size)

    def is_of(self, raw: Mapping[str, Any]) -> bool:
        """By model type."""
        return self.knows(str(raw.get("model_type")))

    def linears_of(
        self, raw: Mapping[str, Any]
    ) -> tuple[Mapping[str, Blocks], Mapping[str, tuple[int, int]]] | None:
        """As the module has them that the config.json gives."""
        config = self._read(raw)
        if config is None:
            return None
        found = find(self, config)
        return found.blocks, found.widths

    def own_config(self, config: Any, place: str) -> Any:
        """Of a model that reads pictures too the configuration of its text model."""
        if not composed.is_composed(config):
            return config
        own = composed.text_config(config, place)
        if not self.matches(own):
            raise BackboneError(
                f"{place}: the text model of this {config.model_type} is of type "
                f"'{own.model_type}', which is no backbone here; use one of type "
                f"{', '.join(self.list_types())}"
            )
        return own

    def own_fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The same of a config.json."""
        whole, own = self._read_whole(raw), self._read(raw)
        return dict(raw) if own is None or own is whole else own.to_dict()

    def _read(self, raw: Mapping[str, Any]) -> Any:
        """The own configuration that a config.json says; None if it says none of this family."""
        whole = self._read_whole(raw)
        try:
            return None if whole is None else self.own_config(whole, "config.json")
        except BackboneError:
            return None

    def _read_whole(self, raw: Mapping[str, Any]) -> Any:
        return model_configs.read_config(raw) if self.knows(str(raw.get("model_type"))) else None

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

    def writer_of(
        self, linear: str, raw: Mapping[str, Any] | None, *, has_negative: bool
    ) -> str | None:
        """What the gate of a feed-forward multiplies; without a gate ReLU lets factors from 0 pass.

        Values before attention, which sums over tokens, unless several queries share them. None
        where the module is not known, or holds several in one linear.
        """
        config = None if raw is None else self._read(raw)
        if config is None:
            return None
        widths = find(self, config).widths
        place = linear.rpartition(".")[0]
        roles = {_role(name): name for name in widths if name.rpartition(".")[0] == place}
        if linear == roles.get("output") and "value" in roles:
            is_alone = widths[linear][0] == widths[roles["value"]][1]
            return roles["value"] if is_alone else None
        if linear != roles.get("down") or "up" not in roles:
            return None
        names = (getattr(config, name, None) for name in ACTIVATIONS)
        passes = "relu" in names and not has_negative
        return roles["up"] if "gate" in roles or passes else None

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
            stack = (match["stack"] or DECODER) if match else ""
            if match is not None and stack in self.stacks:
                lists[stack] = match["list"]
                numbers.setdefault(stack, set()).add(int(match["block"]))
                linears.setdefault(stack, set()).add(name[match.end() :])
        found = {}
        for stack in (one for one in self.stacks if one in lists):
            ordered = in_order(linears[stack])
            found[stack] = Blocks(
                name=lists[stack],
                count=likeliest_depth(numbers[stack]),
                sublayers=tuple(tuple(n for n in ordered if part_of(n) == part) for part in PARTS),
                is_whole=False,
            )
        return found

    def find_position(self, name: str) -> Position | None:
        """Where a linear sits, by its name."""
        match = BLOCKS.match(name)
        stack = (match["stack"] or DECODER) if match else ""
        if match is None or stack not in self.stacks:
            return None
        part = PARTS.index(part_of(name[match.end() :]))
        return Position(stack, int(match["block"]), part)

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
            is_list = isinstance(value, list | tuple) and not name.endswith("_token_id")
            if is_list and len(value) == old:
                setattr(resized, name, type(value)(value[n % old] for n in range(count)))
        resized.num_hidden_layers = count
        return resized

    # -- the module ------------------------------------------------------------------------------

    def fill_buffers(self, model: nn.Module, config: Any) -> None:
        """Rotary frequencies and the like, as transformers loads them: computed in float32, kept in
        the data type that they have in a model of this one's.

        The model may have been cast since it was built, or built on the meta device.
        """
        from accelerate import init_empty_weights
        from transformers.modeling_utils import local_torch_dtype

        with init_empty_weights(include_buffers=False):
            fresh = self.build(copy.deepcopy(config))
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        with local_torch_dtype(dtype), torch.device("meta"):
            typed = dict(self.build(copy.deepcopy(config)).named_buffers())
        for name, buffer in fresh.named_buffers():
            place, _, last = name.rpartition(".")
            module = model.get_submodule(place)
            device = module._buffers[last].device  # type: ignore[union-attr]
            setattr(module, last, buffer.to(device, typed[name].dtype))

    def arrange(self, raw: Mapping[str, Any], names: frozenset[str]) -> Arrangement:
        """As transformers maps names and ignores some; a tied tensor may stand for the other."""
        whole, config = self._read_whole(raw), self._read(raw)
        found = find(self, config)
        is_part = composed.is_composed(whole)
        if is_part:
            stored, unused = composed.arrange(whole, found.model, names)
        else:
            stored, unused = map_names(found.model, names), frozenset[str]()
        ignored = [name for name in stored if found.ignores(name)]
        unused |= {part for name in ignored for part in stored.pop(name).names}
        for name, target in found.ties.items():
            if target not in stored and name in stored:
                stored[target] = stored.pop(name)
        moved = {name: parts for name, parts in stored.items() if parts.names != (name,)}
        return Arrangement(moved, unused, is_part=is_part, is_usual=not is_part)

    def find_ties(
        self, raw: Mapping[str, Any], names: frozenset[str], are_equal: Callable[[str, str], bool]
    ) -> dict[str, str]:
        """What the configuration ties, where it is absent or found to be equal, as transformers."""
        found = find(self, self._read(raw)).ties.items()
        return {n: other for n, other in found if n not in names or are_equal(n, other)}

    def random_weight(
        self, config: Any, name: str, shape: tuple[int, ...], generator: torch.Generator
    ) -> Tensor:
        """A weight as the architecture's own rules initialise it."""
        return make_weight(find(self, config).model, name, shape, generator.initial_seed())
