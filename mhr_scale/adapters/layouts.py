"""Layouts: which linears of which blocks an adapter has, as recipes and artefacts name them.

A layout is a word that means the same for every backbone (`families.family.LAYOUTS`), or a list of
ends of linears' names, as PEFT's `target_modules` are: `q_proj` stands for every linear that is
called so, `mlp.c_proj` for that of the feed-forward alone. The blocks are all of them, or numbers
and ranges from 0: `8-15`, `0-3,28-31`; in a backbone with two stacks, those of both.

A linear that holds several projections (`qkv_proj`, `query_key_value`, `gate_up_proj`) is one
linear of the whole width here: it has one pair per skill, and `light`, which asks for keys and
values, adapts the one that holds them among others as a whole (docs/method.md 1).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mhr_scale.adapters.config import ALL_BLOCKS, AdapterConfig, block_numbers, block_ranges
from mhr_scale.errors import ConfigError, LayoutError, did_you_mean, some
from mhr_scale.families.family import LAYOUTS, Blocks, Family, last_part
from mhr_scale.families.linear_names import is_of_experts


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout's linears and blocks, as the settings `adapter.layout` and `adapter.blocks`."""

    linears: str | tuple[str, ...]
    blocks: str = ALL_BLOCKS

    @classmethod
    def of(cls, config: AdapterConfig) -> "Layout":
        """The layout that a recipe sets."""
        return cls(config.layout, config.blocks)

    @property
    def text(self) -> str:
        """The layout in words."""
        words = self.linears if isinstance(self.linears, str) else ", ".join(self.linears)
        return words if self.blocks == ALL_BLOCKS else f"{words} of blocks {self.blocks}"

    @property
    def settings(self) -> dict[str, str | tuple[str, ...]]:
        """Fields of `AdapterConfig`."""
        return {"layout": self.linears, "blocks": self.blocks}


def list_names(family: Family, stacks: Mapping[str, Blocks], layout: Layout) -> list[str]:
    """Whole names of the linears of a layout, stack by stack and block by block.

    Raises `LayoutError` for linears and blocks that are not there, or that cannot have adapters.
    """
    numbers = None if layout.blocks == ALL_BLOCKS else block_numbers(layout.blocks)
    for of_stack in stacks.values():
        beyond = [number for number in numbers or () if number >= of_stack.count]
        if beyond:
            raise LayoutError(
                f"adapter.blocks: '{layout.blocks}' names block {beyond[0]}, and {of_stack.name} "
                f"has {of_stack.count} blocks, from 0 to {of_stack.count - 1}"
            )
    if isinstance(layout.linears, str):
        chosen = {s: _in_word(family, of, layout.linears) for s, of in stacks.items()}
    else:
        chosen = {s: _in_list(of.linears, layout.linears) for s, of in stacks.items()}
        for end in layout.linears:
            if not any(_is_named(name, end) for names in chosen.values() for name in names):
                raise _unmatched(end, stacks)
    return [n for stack, of in stacks.items() for n in of.list_linears(chosen[stack], numbers)]


def _in_word(family: Family, blocks: Blocks, word: str) -> tuple[str, ...]:
    """Names below the block of the linears of a layout that is a word."""
    if word in LAYOUTS:
        return family.in_layout(word, blocks)
    hint = did_you_mean(word, LAYOUTS)
    if _in_list(blocks.linears, (word,)):
        hint = f"; did you mean the list [{word}]?"
    raise LayoutError(
        f"adapter.layout: '{word}' is unknown to {family.name}; known: {', '.join(LAYOUTS)}"
        f"{hint or ', or a list of names of linears'}"
    )


def _in_list(linears: Sequence[str], ends: Sequence[str]) -> tuple[str, ...]:
    """Those of a block's linears whose names have one of these ends."""
    return tuple(name for name in linears if any(_is_named(name, end) for end in ends))


def _is_named(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _unmatched(end: str, stacks: Mapping[str, Blocks]) -> LayoutError:
    """The error for an end of a name that no linear of every block has."""
    for blocks in stacks.values():
        for name in blocks.frozen:
            if f".{end}." in f".{name}.":
                where = "of experts" if is_of_experts(name) else "of some blocks, or beside experts"
                return LayoutError(
                    f"adapter.layout: '{end}' is {where} ({name} in {blocks.name}) and stays "
                    "frozen; adapt linears that every block has, as `layout: attention` does"
                )
    if end in LAYOUTS:
        return LayoutError(
            f"adapter.layout: '{end}' stands alone, and names of linears stand in a list; give one "
            "or the other"
        )
    known = dict.fromkeys(last_part(n) for blocks in stacks.values() for n in blocks.linears)
    return LayoutError(
        f"adapter.layout: no linear of the blocks is called '{end}'; they have "
        f"{some(known)}{did_you_mean(end, known)}"
    )


# -- layouts of linears that come by name ----------------------------------------------------------


def recognisable(
    family: Family, stacks: Mapping[str, Blocks], names: Sequence[str], *, blocks: str | None = None
) -> Iterator[tuple[Layout, list[str]]]:
    """The layouts that linears of these names may be all of, the plainest first, and their linears.

    `blocks` are those that the layout has, where that is known; else it has all, or those named.
    """
    places = dict.fromkeys((ALL_BLOCKS, _blocks_named(family, stacks, names)))
    for linears in (*LAYOUTS, _ends_of(stacks, names)):
        for place in places if blocks is None else (blocks,):
            layout = Layout(linears, place)
            with suppress(LayoutError, ConfigError):  # none of this family, or not in both stacks
                if listed := list_names(family, stacks, layout):
                    yield layout, listed


def _blocks_named(family: Family, stacks: Mapping[str, Blocks], names: Sequence[str]) -> str:
    """The blocks in which linears lie, as `adapter.blocks` says them; all if they are."""
    positions = [position for position in map(family.find_position, names) if position]
    numbers = {position.block for position in positions}
    counts = [stacks[p.stack].count for p in positions if p.stack in stacks]
    if not numbers or numbers == set(range(max(counts, default=0))):
        return ALL_BLOCKS
    return block_ranges(numbers)


def _ends_of(stacks: Mapping[str, Blocks], names: Sequence[str]) -> tuple[str, ...]:
    """The shortest ends of names that tell these linears from all others of the blocks.

    Linears of two stacks that have the same name below the block are told apart by none.
    """
    given = set(names)
    pairs = [(linear, blocks) for blocks in stacks.values() for linear in blocks.linears]
    chosen = [n for n, blocks in pairs if not given.isdisjoint(blocks.list_linears((n,)))]
    others = [n for n, _ in pairs if n not in chosen]
    ends: dict[str, None] = {}
    for linear in chosen:
        parts = linear.split(".")
        tails = [".".join(parts[n:]) for n in reversed(range(len(parts)))]
        ends[next((t for t in tails if not _in_list(others, (t,))), linear)] = None
    return tuple(ends)
