"""Which linears of a backbone are adapted, and which of them share one routing table.

Whatever depends on the names of linears in a backbone is answered by its family
(`families.family`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mhr_scale.adapters.config import ALL_BLOCKS
from mhr_scale.adapters.layouts import Layout, list_names, recognisable
from mhr_scale.errors import LayoutError
from mhr_scale.families import table
from mhr_scale.families.family import LAYOUTS, Family, Position, last_part
from mhr_scale.families.linear_modules import find_widths


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One adapted linear: its name in the backbone, its widths and its position."""

    name: str
    in_features: int
    out_features: int
    stack: str
    block: int
    sublayer: int

    def routing_group(self, granularity: str, block_span: int) -> str:
        """Name of the routing table this linear reads (docs/method.md 4)."""
        return {
            "linear": self.name,
            "sublayer": f"{self.stack}.block.{self.block}.layer.{self.sublayer}",
            "block": f"{self.stack}.block.{self.block}",
            "blocks": f"{self.stack}.blocks.{self.block // block_span * block_span}",
            "stack": self.stack,
            "model": "model",
        }[granularity]


def _make_site(name: str, position: Position, in_features: int, out_features: int) -> Site:
    return Site(name=name, in_features=in_features, out_features=out_features, **position._asdict())


def find_sites(
    model: nn.Module, layout: str | Sequence[str] = "full", blocks: str = ALL_BLOCKS
) -> tuple[Site, ...]:
    """Return the linears of `model` that a layout names, in a fixed order.

    `layout` is one of `LAYOUTS`, or ends of linears' names (`q_proj`, `mlp.c_proj`); `blocks` are
    the blocks that have adapters (`adapters.layouts`). Raises `LayoutError` if they name nothing,
    something that no adapter can be attached to, or linears that the model does not have.
    """
    config: Any = model.config
    family = table.find_family(config)
    stacks = family.blocks(config)
    wanted = Layout(layout if isinstance(layout, str) else tuple(layout), blocks)
    names = list_names(family, stacks, wanted)
    modules = dict(model.named_modules())
    sites = []
    for name in names:
        position, module = family.find_position(name), modules.get(name)
        widths = None if module is None else find_widths(module)
        if position is not None and widths is not None:
            sites.append(_make_site(name, position, *widths))
    if len(sites) != len(names):
        counts = Counter(last_part(site.name) for site in sites)
        raise LayoutError(
            f"layout '{wanted.text}' matches {len(sites)} linears of a {family.name} model "
            f"with {'+'.join(str(stack.count) for stack in stacks.values())} blocks, expected "
            f"{len(names)} (found {dict(counts)}); known layouts: {', '.join(LAYOUTS)}"
        )
    return tuple(sites)


def recognise_sites(
    widths: Mapping[str, tuple[int, int]], *, blocks: str | None = None
) -> tuple[Layout, tuple[Site, ...]]:
    """Layout and sites, in their fixed order, of linears known by name and (in, out) widths.

    For tensors that come without their backbone; `blocks` are those that have adapters, where that
    is known. Raises `LayoutError` if the linears are not all those of one layout, naming what is
    missing or unknown in the nearest one.
    """
    names = tuple(widths)
    nearest: tuple[int, str] | None = None
    for family in table.FAMILIES:
        stacks = family.blocks_of(names)
        for layout, listed in recognisable(family, stacks, names, blocks=blocks):
            faults = [f"missing {name}" for name in listed if name not in widths]
            faults += [f"unknown {name}" for name in sorted(widths.keys() - set(listed))]
            if not faults:
                return layout, _sites_of(family, listed, widths)
            if nearest is None or len(faults) < nearest[0]:
                words = f"nearest is '{layout.text}', with {len(faults)} odd"
                nearest = len(faults), f"{words}: {'; '.join(faults[:5])}"
    why = nearest[1] if nearest else f"such as {', '.join(names[:3])}"
    raise LayoutError(f"the {len(names)} linears are those of no layout; {why}")


def sites_in(
    raw: Mapping[str, Any], linears: Sequence[str]
) -> tuple[Layout, tuple[Site, ...]] | None:
    """The smallest layout with all these linears, and its sites in a backbone of this config.json.

    None if no layout has all of them, or if the configuration does not tell the sizes.
    """
    family = table.family_of_linears(linears, raw)
    found = family.linears_of(raw)
    if found is None:
        return None
    stacks, widths = found
    possible = recognisable(family, stacks, linears)
    fitting = [(layout, names) for layout, names in possible if set(linears) <= set(names)]
    if not fitting:
        return None
    layout, names = min(fitting, key=lambda one: len(one[1]))
    return layout, _sites_of(family, names, widths)


def _sites_of(
    family: Family, names: Sequence[str], widths: Mapping[str, tuple[int, int]]
) -> tuple[Site, ...]:
    positions = {name: family.find_position(name) for name in names}
    return tuple(_make_site(n, place, *widths[n]) for n, place in positions.items() if place)


def family_of_sites(sites: Sequence[Site]) -> Family:
    """The family whose linears these are."""
    return table.family_of_linears(site.name for site in sites)


def backbone_width(sites: Sequence[Site]) -> int | None:
    """The width of the residual stream: the input of the first linear that reads from it.

    None if no linear does.
    """
    inputs = family_of_sites(sites).inputs
    widths = (site.in_features for site in sites if last_part(site.name) not in inputs)
    return next(widths, None)


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
