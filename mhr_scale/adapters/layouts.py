"""Layouts: which linears of which blocks an adapter has, as recipes and artefacts name them.

A layout is a word that means the same for every backbone (`families.family.LAYOUTS`), or a list of
ends of linears' names, as PEFT's `target_modules` are: `q_proj` stands for every linear that is
called so, `mlp.c_proj` for that of the feed-forward alone. The blocks are all of them, or numbers
and ranges from 0: `8-15`, `0-3,28-31`; in a backbone with two stacks, those of both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mhr_scale.adapters.config import ALL_BLOCKS, block_numbers
from mhr_scale.errors import LayoutError, did_you_mean, some
from mhr_scale.families.family import LAYOUTS, Blocks, Family


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout's linears and blocks, as the settings `adapter.layout` and `adapter.blocks`."""

    linears: str | tuple[str, ...]
    blocks: str = ALL_BLOCKS

    @property
    def text(self) -> str:
        """The layout in words."""
        words = as_text(self.linears)
        return words if self.blocks == ALL_BLOCKS else f"{words} of blocks {self.blocks}"

    @property
    def settings(self) -> dict[str, str | tuple[str, ...]]:
        """Fields of `AdapterConfig`."""
        return {"layout": self.linears, "blocks": self.blocks}


def as_text(linears: str | Sequence[str]) -> str:
    """A layout's linears in words."""
    return linears if isinstance(linears, str) else ", ".join(linears)


def list_names(
    family: Family, stacks: Mapping[str, Blocks], linears: str | Sequence[str], blocks: str
) -> list[str]:
    """Whole names of the linears of a layout, stack by stack and block by block.

    Raises `LayoutError` for linears and blocks that are not there, or that cannot have adapters.
    """
    numbers = None if blocks == ALL_BLOCKS else block_numbers(blocks)
    for blocks_of_stack in stacks.values():
        beyond = [n for n in numbers or () if n >= blocks_of_stack.count]
        if beyond:
            raise LayoutError(
                f"adapter.blocks: '{blocks}' names block {beyond[0]}, and {blocks_of_stack.name} "
                f"has {blocks_of_stack.count} blocks, from 0 to {blocks_of_stack.count - 1}"
            )
    chosen = {stack: _choose(family, of_stack, linears) for stack, of_stack in stacks.items()}
    if not isinstance(linears, str):
        for end in linears:
            if not any(_is_named(name, end) for names in chosen.values() for name in names):
                raise _unmatched(end, stacks)
    return [n for stack, of in stacks.items() for n in of.list_linears(chosen[stack], numbers)]


def _choose(family: Family, blocks: Blocks, linears: str | Sequence[str]) -> tuple[str, ...]:
    """Names below the block of a layout's linears."""
    if not isinstance(linears, str):
        return tuple(n for n in blocks.linears if any(_is_named(n, end) for end in linears))
    if linears not in LAYOUTS:
        hint = did_you_mean(linears, LAYOUTS)
        raise LayoutError(
            f"adapter.layout: '{linears}' is unknown to {family.name}; known: "
            f"{', '.join(LAYOUTS)}{hint}; or give a list of linears' names"
        )
    return family.in_layout(linears, blocks)


def _is_named(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _unmatched(end: str, stacks: Mapping[str, Blocks]) -> LayoutError:
    """The error for an end of a name that no linear of every block has."""
    frozen = [name for blocks in stacks.values() for name in blocks.frozen]
    if any(_is_named(name, end) or _is_named(name, f"{end}.weight") for name in frozen):
        return LayoutError(
            f"adapter.layout: '{end}' is of a mixture of experts, or of some blocks only, and "
            "stays frozen; adapt attention, as `layout: attention` does"
        )
    known = dict.fromkeys(
        name.rpartition(".")[2] for blocks in stacks.values() for name in blocks.linears
    )
    hint = did_you_mean(end, known)
    return LayoutError(
        f"adapter.layout: no linear of the blocks is called '{end}'; they have "
        f"{some(list(known))}{hint}"
    )


# -- layouts of linears that come by name ----------------------------------------------------------


def recognisable(
    family: Family, stacks: Mapping[str, Blocks], names: Sequence[str]
) -> Iterator[Layout]:
    """The layouts that linears of these names may be all of, the plainest first."""
    blocks = _blocks_named(family, stacks, names)
    places = dict.fromkeys((ALL_BLOCKS, blocks))
    for place in places:
        for layout in LAYOUTS:
            try:
                if any(family.in_layout(layout, of_stack) for of_stack in stacks.values()):
                    yield Layout(layout, place)
            except LayoutError:  # the family does not know which of its linears are of it
                continue
    ends = _ends_of(stacks, names)
    for place in places if ends else ():
        yield Layout(ends, place)


def _blocks_named(family: Family, stacks: Mapping[str, Blocks], names: Sequence[str]) -> str:
    """The blocks in which linears lie, as `adapter.blocks` says them; all if they are."""
    positions = [position for position in map(family.find_position, names) if position]
    numbers = sorted({position.block for position in positions})
    counts = {stacks[p.stack].count for p in positions if p.stack in stacks}
    if not numbers or (counts and numbers == list(range(max(counts)))):
        return ALL_BLOCKS
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _ends_of(stacks: Mapping[str, Blocks], names: Sequence[str]) -> tuple[str, ...]:
    """The shortest ends of names that tell these linears from the others of their blocks."""
    given = set(names)
    ends = []
    for of_stack in stacks.values():
        chosen = {
            linear
            for linear in of_stack.linears
            if not given.isdisjoint(of_stack.list_linears((linear,)))
        }
        others = [linear for linear in of_stack.linears if linear not in chosen]
        for linear in sorted(chosen, key=of_stack.linears.index):
            parts = linear.split(".")
            tails = [".".join(parts[n:]) for n in reversed(range(len(parts)))]
            shortest = (t for t in tails if not any(_is_named(name, t) for name in others))
            ends.append(next(shortest, linear))
    return tuple(dict.fromkeys(ends))
