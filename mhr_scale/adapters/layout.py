"""Which linears of a backbone are adapted, and which of them share one routing table.

A backbone family is one row of `FAMILIES`: how its models are recognised, how the name of a linear
tells where it sits, and what each layout wraps. A new family with other names is one more row.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mhr_scale.errors import LayoutError, did_you_mean

ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A row of the table of backbone families.

    `site` matches the full name of a linear with groups stack, block, sublayer, kind and linear.
    `layouts` maps a layout to the last name parts it wraps, `sublayers` a stack to the kinds of
    the sub-layers that each of its blocks has.
    """

    name: str
    model_types: tuple[str, ...]
    gated: bool
    site: re.Pattern[str]
    sublayers: dict[str, tuple[str, ...]]
    layouts: dict[str, tuple[str, ...]]

    def expected_sites(self, layout: str, config: Any) -> int:
        """Number of linears `layout` must match in a model with this configuration."""
        attention = sum(name in ATTENTION for name in self.layouts[layout])
        feed_forward = len(self.layouts[layout]) - attention
        encoder, decoder = config.num_layers, config.num_decoder_layers
        return encoder * (attention + feed_forward) + decoder * (2 * attention + feed_forward)

    def linear_names(self, layout: str, n_blocks: Mapping[str, int]) -> list[str]:
        """Names of the linears of `layout` in a model's own order; `n_blocks` is per stack."""
        return [
            f"{stack}.block.{block}.layer.{number}.{kind}.{linear}"
            for stack, kinds in self.sublayers.items()
            for block in range(n_blocks[stack])
            for number, kind in enumerate(kinds)
            for linear in self.layouts[layout]
            if (linear in ATTENTION) == kind.endswith("Attention")
        ]


T5_SITE = re.compile(
    r"(?P<stack>encoder|decoder)\.block\.(?P<block>\d+)\.layer\.(?P<sublayer>\d+)"
    r"\.(?P<kind>SelfAttention|EncDecAttention|DenseReluDense)\.(?P<linear>\w+)"
)

T5_SUBLAYERS = {
    "encoder": ("SelfAttention", "DenseReluDense"),
    "decoder": ("SelfAttention", "EncDecAttention", "DenseReluDense"),
}

FAMILIES: tuple[Family, ...] = (
    Family(
        name="T5 v1.1 (gated: LM-adapt, T0, FLAN, mT5)",
        model_types=("t5", "mt5"),
        gated=True,
        site=T5_SITE,
        sublayers=T5_SUBLAYERS,
        layouts={
            "full": (*ATTENTION, "wi_0", "wi_1", "wo"),
            "light": ("k", "v", "wi_1"),
            "attention": ATTENTION,
        },
    ),
    Family(
        name="T5 v1.0 (ungated)",
        model_types=("t5",),
        gated=False,
        site=T5_SITE,
        sublayers=T5_SUBLAYERS,
        layouts={
            "full": (*ATTENTION, "wi", "wo"),
            "light": ("k", "v", "wi"),
            "attention": ATTENTION,
        },
    ),
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


def _make_site(name: str, place: re.Match[str], in_features: int, out_features: int) -> Site:
    """The site of a linear whose name matches its family's pattern as `place`."""
    return Site(
        name=name,
        in_features=in_features,
        out_features=out_features,
        stack=place["stack"],
        block=int(place["block"]),
        sublayer=int(place["sublayer"]),
    )


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
        place = family.site.fullmatch(name)
        if place and place["linear"] in children and isinstance(module, nn.Linear):
            sites.append(_make_site(name, place, module.in_features, module.out_features))
    expected = family.expected_sites(layout, config)
    if not sites or len(sites) != expected:
        counts = Counter(site.name.rsplit(".", 1)[1] for site in sites)
        raise LayoutError(
            f"layout '{layout}' matches {len(sites)} linears of a {family.name} model with "
            f"{config.num_layers}+{config.num_decoder_layers} blocks, expected {expected} "
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
        places = {name: place for name in widths if (place := family.site.fullmatch(name))}
        blocks = {(place["stack"], int(place["block"])) for place in places.values()}
        n_blocks = {
            stack: _likeliest_depth([block for s, block in blocks if s == stack])
            for stack in family.sublayers
        }
        for layout in family.layouts:
            names = family.linear_names(layout, n_blocks)
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
