"""Which linears of a backbone are adapted, and which of them share one routing table.

A backbone family is one row of `FAMILIES`: how its models are recognised, how their linears are
called, and what each layout wraps. A new family with other names is one more row.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from mhr_scale.errors import LayoutError, did_you_mean


class Place(NamedTuple):
    """Where a linear sits."""

    stack: str
    block: int
    sublayer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The blocks of a stack: the module that lists them, and what lies in each.

    `depth` is what the configuration calls their number. `sublayers` are the linears of each
    sub-layer by their names below the block, in the model's own order.
    """

    name: str
    depth: str
    sublayers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A row of the table of backbone families.

    `layouts` maps a layout to the last name parts it wraps, `inputs` those that do not read the
    backbone's width to the one whose outputs they read.
    """

    name: str
    model_types: tuple[str, ...]
    gated: bool = False
    stacks: dict[str, Blocks]
    layouts: dict[str, tuple[str, ...]]
    inputs: dict[str, str]

    def depths(self, config: Any) -> dict[str, int]:
        """Number of blocks per stack of a model with this configuration."""
        return {stack: getattr(config, blocks.depth) for stack, blocks in self.stacks.items()}

    def linear_names(self, layout: str, depths: Mapping[str, int]) -> list[str]:
        """Names of the linears of `layout` in a model's own order."""
        return [
            f"{blocks.name}.{number}.{linear}"
            for stack, blocks in self.stacks.items()
            for number in range(depths[stack])
            for linears in blocks.sublayers
            for linear in linears
            if _last(linear) in self.layouts[layout]
        ]

    def find_place(self, name: str) -> Place | None:
        """Where the linear of this name sits, if it is one of the family's."""
        for stack, blocks in self.stacks.items():
            number, _, linear = name.removeprefix(f"{blocks.name}.").partition(".")
            for sublayer, linears in enumerate(blocks.sublayers):
                if linear in linears and name == f"{blocks.name}.{number}.{linear}":
                    return Place(stack, int(number), sublayer) if number.isdecimal() else None
        return None


def below(module: str, linears: Sequence[str]) -> tuple[str, ...]:
    """Names of the linears of a module, as a row lists them."""
    return tuple(f"{module}.{linear}" for linear in linears)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def t5_family(
    *, name: str, model_types: tuple[str, ...], gated: bool, wide: Sequence[str]
) -> Family:
    """A family of T5s whose feed-forward has the linears `wide`, then wo."""
    attention, feed_forward = ("q", "k", "v", "o"), (*wide, "wo")
    return Family(
        name=name,
        model_types=model_types,
        gated=gated,
        stacks={
            "encoder": Blocks(
                name="encoder.block",
                depth="num_layers",
                sublayers=(
                    below("layer.0.SelfAttention", attention),
                    below("layer.1.DenseReluDense", feed_forward),
                ),
            ),
            "decoder": Blocks(
                name="decoder.block",
                depth="num_decoder_layers",
                sublayers=(
                    below("layer.0.SelfAttention", attention),
                    below("layer.1.EncDecAttention", attention),
                    below("layer.2.DenseReluDense", feed_forward),
                ),
            ),
        },
        layouts={
            "full": (*attention, *feed_forward),
            "light": ("k", "v", wide[-1]),
            "attention": attention,
        },
        inputs={"o": "v", "wo": wide[-1]},
    )


FAMILIES: tuple[Family, ...] = (
    t5_family(
        name="T5 v1.1 (gated: LM-adapt, T0, FLAN, mT5)",
        model_types=("t5", "mt5"),
        gated=True,
        wide=("wi_0", "wi_1"),
    ),
    t5_family(name="T5 v1.0 (ungated)", model_types=("t5",), gated=False, wide=("wi",)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One adapted linear: its name in the backbone, its widths and where it sits."""

    name: str
    in_features: int
    out_features: int
    stack: str
    block: int
    sublayer: int

    def routing_group(self, granularity: str, block_span: int) -> str:
        """Name of the routing table this linear reads (method notes 1.5)."""
        return {
            "linear": self.name,
            "sublayer": f"{self.stack}.block.{self.block}.layer.{self.sublayer}",
            "block": f"{self.stack}.block.{self.block}",
            "blocks": f"{self.stack}.blocks.{self.block // block_span * block_span}",
            "stack": self.stack,
            "model": "model",
        }[granularity]


def _make_site(name: str, place: Place, in_features: int, out_features: int) -> Site:
    return Site(name=name, in_features=in_features, out_features=out_features, **place._asdict())


def find_family(config: Any) -> Family:
    """Return the family of a model configuration; raises `LayoutError` for an unknown one."""
    gated = bool(getattr(config, "is_gated_act", False))
    for family in FAMILIES:
        if config.model_type in family.model_types and family.gated == gated:
            return family
    known = ", ".join(sorted({name for family in FAMILIES for name in family.model_types}))
    raise LayoutError(
        f"no layout for backbones of type '{config.model_type}'; known types: {known} "
        "(a new family is one row of FAMILIES in mhr_scale/adapters/layout.py)"
    )


def find_sites(model: nn.Module, layout: str) -> tuple[Site, ...]:
    """Return the linears of `model` that `layout` names, in the model's own order.

    Raises `LayoutError` if the layout is unknown to the model's family, matches nothing, or does
    not match the number of linears the configuration implies.
    """
    config: Any = model.config
    family = find_family(config)
    known = ", ".join(family.layouts)
    if layout not in family.layouts:
        hint = did_you_mean(layout, family.layouts)
        raise LayoutError(
            f"adapter.layout: '{layout}' is unknown to {family.name}; known: {known}{hint}"
        )
    children = family.layouts[layout]
    sites = []
    for name, module in model.named_modules():
        place = family.find_place(name)
        if place and _last(name) in children and isinstance(module, nn.Linear):
            sites.append(_make_site(name, place, module.in_features, module.out_features))
    depths = family.depths(config)
    expected = len(family.linear_names(layout, depths))
    if not sites or len(sites) != expected:
        counts = Counter(_last(site.name) for site in sites)
        raise LayoutError(
            f"layout '{layout}' matches {len(sites)} linears of a {family.name} model with "
            f"{'+'.join(map(str, depths.values()))} blocks, expected {expected} "
            f"(found {dict(counts)}); known layouts: {known}"
        )
    return tuple(sites)


def recognise_sites(widths: Mapping[str, tuple[int, int]]) -> tuple[str, tuple[Site, ...]]:
    """Layout and sites, in a model's own order, of linears known by name and (in, out) widths.

    For tensors that come without their backbone. Raises `LayoutError` if the linears are not all
    those of one layout, with the odd ones of the nearest layout.
    """
    nearest: tuple[str, list[str]] | None = None
    for family in FAMILIES:
        places = {name: place for name in widths if (place := family.find_place(name))}
        blocks = {(place.stack, place.block) for place in places.values()}
        depths = {
            stack: _likeliest_depth([block for s, block in blocks if s == stack])
            for stack in family.stacks
        }
        for layout in family.layouts:
            names = family.linear_names(layout, depths)
            odd = [f"missing {name}" for name in names if name not in widths]
            odd += [f"unknown {name}" for name in sorted(widths.keys() - set(names))]
            if not odd:
                return layout, tuple(
                    _make_site(name, places[name], *widths[name]) for name in names
                )
            if nearest is None or len(odd) < len(nearest[1]):
                nearest = (layout, odd)
    assert nearest is not None
    layout, odd = nearest
    raise LayoutError(
        f"the {len(widths)} linears are those of no layout; nearest is '{layout}', with "
        f"{len(odd)} odd: {'; '.join(odd[:5])}"
    )


def backbone_width(sites: Sequence[Site]) -> int:
    """The width that most linears read: that of the first which does not read another's outputs."""
    inputs = inputs_of(site.name for site in sites)
    return next(site.in_features for site in sites if _last(site.name) not in inputs)


def inputs_of(names: Iterable[str]) -> dict[str, str]:
    """`inputs` of the family that knows most of these linears."""
    names = tuple(names)
    known = [sum(family.find_place(name) is not None for name in names) for family in FAMILIES]
    return FAMILIES[known.index(max(known))].inputs


def _likeliest_depth(blocks: Sequence[int]) -> int:
    """Number of blocks of a stack for which fewest of the blocks seen are missing or too many."""
    depths = (block + 1 for block in sorted(blocks, reverse=True))
    return min(depths, key=lambda n: n - 2 * sum(block < n for block in blocks), default=1)


def check_splits(sites: tuple[Site, ...], *, n_splits: int, kind: str) -> None:
    """Raise `LayoutError` if `n_splits` does not divide a width it has to split."""
    for site in sites:
        widths = {"output": site.out_features}
        if kind == "lora":
            widths = {"input": site.in_features, **widths}
        for side, width in widths.items():
            if width % n_splits:
                divisors = [d for d in range(1, width + 1) if width % d == 0]
                near = sorted(divisors, key=lambda d: abs(d - n_splits))[:2]
                raise LayoutError(
                    f"adapter.n_splits: {n_splits} does not divide the {side} width {width} of "
                    f"{site.name}; use a divisor such as {' or '.join(map(str, sorted(near)))}"
                )
