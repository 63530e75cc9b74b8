"""Which linears of a backbone are adapted, and which of them share one routing table.

Whatever depends on the names of linears in a backbone is answered by its family
(`families.family`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mhr_scale.errors import LayoutError, did_you_mean
from mhr_scale.families import table
from mhr_scale.families.family import Blocks, Family, Position, last_part


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


def find_sites(model: nn.Module, layout: str) -> tuple[Site, ...]:
    """Return the linears of `model` that `layout` names, in the model's own order.

    Raises `LayoutError` if the layout is unknown to the model's family, matches nothing, or does
    not match the number of linears the configuration implies.
    """
    config: Any = model.config
    family = table.find_family(config)
    known = ", ".join(family.layouts)
    if layout not in family.layouts:
        hint = did_you_mean(layout, family.layouts)
        raise LayoutError(
            f"adapter.layout: '{layout}' is unknown to {family.name}; known: {known}{hint}"
        )
    endings = family.layouts[layout]
    sites = []
    for name, module in model.named_modules():
        position = family.find_position(name)
        if position and last_part(name) in endings and isinstance(module, nn.Linear):
            sites.append(_make_site(name, position, module.in_features, module.out_features))
    blocks = family.blocks(config)
    expected = len(_list_linears(family, layout, blocks))
    if not sites or len(sites) != expected:
        counts = Counter(last_part(site.name) for site in sites)
        raise LayoutError(
            f"layout '{layout}' matches {len(sites)} linears of a {family.name} model with "
            f"{'+'.join(str(stack.count) for stack in blocks.values())} blocks, expected "
            f"{expected} (found {dict(counts)}); known layouts: {known}"
        )
    return tuple(sites)


def _list_linears(family: Family, layout: str, blocks: Mapping[str, Blocks]) -> list[str]:
    """Names of the linears of a layout in a model's own order."""
    endings = family.layouts[layout]
    return [name for stack in blocks.values() for name in stack.list_linears(endings)]


def recognise_sites(widths: Mapping[str, tuple[int, int]]) -> tuple[str, tuple[Site, ...]]:
    """Layout and sites, in a model's own order, of linears known by name and (in, out) widths.

    For tensors that come without their backbone. Raises `LayoutError` if the linears are not all
    those of one layout, naming what is missing or unknown in the nearest layout.
    """
    nearest: tuple[str, list[str]] | None = None
    for family in table.FAMILIES:
        positions = {n: position for n in widths if (position := family.find_position(n))}
        blocks = family.blocks_of(tuple(widths))
        for layout in family.layouts:
            names = _list_linears(family, layout, blocks)
            faults = [f"missing {name}" for name in names if name not in widths]
            faults += [f"unknown {name}" for name in sorted(widths.keys() - set(names))]
            if not faults:
                return layout, tuple(
                    _make_site(name, positions[name], *widths[name]) for name in names
                )
            if nearest is None or len(faults) < len(nearest[1]):
                nearest = (layout, faults)
    assert nearest is not None
    layout, faults = nearest
    raise LayoutError(
        f"the {len(widths)} linears are those of no layout; nearest is '{layout}', with "
        f"{len(faults)} odd: {'; '.join(faults[:5])}"
    )


def sites_in(raw: Mapping[str, Any], linears: Sequence[str]) -> tuple[str, tuple[Site, ...]] | None:
    """The smallest layout with all these linears, and its sites in a backbone of this config.json.

    None if no layout has all of them, or if the configuration does not tell the sizes.
    """
    family = table.family_of_linears(linears, raw)
    found = family.linears_of(raw)
    if found is None:
        return None
    blocks, widths = found
    listed = {layout: _list_linears(family, layout, blocks) for layout in family.layouts}
    fitting = [layout for layout, names in listed.items() if set(linears) <= set(names)]
    if not fitting:
        return None
    layout = min(fitting, key=lambda name: len(listed[name]))
    sites = []
    for name in listed[layout]:
        position = family.find_position(name)
        assert position is not None
        sites.append(_make_site(name, position, *widths[last_part(name)]))
    return layout, tuple(sites)


def family_of_sites(sites: Sequence[Site]) -> Family:
    """The family whose linears these are."""
    return table.family_of_linears(site.name for site in sites)


def backbone_width(sites: Sequence[Site]) -> int:
    """The width of the residual stream: the input of the first linear that reads from it."""
    inputs = family_of_sites(sites).inputs
    return next(site.in_features for site in sites if last_part(site.name) not in inputs)


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
