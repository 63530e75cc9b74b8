"""Families whose blocks and linears are known by name: a table of patterns, one per stack."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mhr_scale.families.family import Blocks, Family, Position, last_part


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPattern:
    """The blocks of a stack; `depth` is what the configuration calls their number."""

    name: str
    depth: str
    sublayers: tuple[tuple[str, ...], ...]

    def at(self, count: int) -> Blocks:
        """So many of these blocks."""
        return Blocks(name=self.name, count=count, sublayers=self.sublayers)


def below(module: str, linears: Sequence[str]) -> tuple[str, ...]:
    """Names of the linears of a module, as a pattern lists them."""
    return tuple(f"{module}.{linear}" for linear in linears)


@dataclass(frozen=True, kw_only=True)
class Named(Family):
    """A family whose models are of a few types, and whose linears have the same names in all."""

    model_types: tuple[str, ...]
    patterns: Mapping[str, BlockPattern]
    """By stack, in the model's own order."""
    layouts: Mapping[str, tuple[str, ...]]
    """By layout, the last name parts of the linears it adapts."""

    def knows(self, model_type: str) -> bool:
        """Whether it is one of the types."""
        return model_type in self.model_types

    def list_types(self) -> Sequence[str]:
        """All types."""
        return self.model_types

    def in_layout(self, layout: str, blocks: Blocks) -> tuple[str, ...]:
        """By the last parts of names."""
        return tuple(n for n in blocks.linears if last_part(n) in self.layouts[layout])

    def blocks(self, config: Any) -> dict[str, Blocks]:
        """The blocks of encoder and decoder."""
        return {
            stack: pattern.at(getattr(config, pattern.depth))
            for stack, pattern in self.patterns.items()
        }

    def blocks_of(self, names: Sequence[str]) -> dict[str, Blocks]:
        """As many blocks as leave fewest of the named ones missing or too many."""
        seen: dict[str, set[int]] = {stack: set() for stack in self.patterns}
        for position in map(self.find_position, names):
            if position is not None:
                seen[position.stack].add(position.block)
        return {
            stack: self.patterns[stack].at(likeliest_depth(numbers))
            for stack, numbers in seen.items()
        }

    def find_position(self, name: str) -> Position | None:
        """Where the linear of this name sits, if it is one of the family's."""
        for stack, pattern in self.patterns.items():
            number, _, linear = name.removeprefix(f"{pattern.name}.").partition(".")
            for sublayer, linears in enumerate(pattern.sublayers):
                if linear in linears and name == f"{pattern.name}.{number}.{linear}":
                    return Position(stack, int(number), sublayer) if number.isdecimal() else None
        return None

    def find_prefix(self, name: str) -> int | None:
        """Where the name of a block begins in a longer name; None if there is none in it."""
        places = (name.find(f"{pattern.name}.") for pattern in self.patterns.values())
        return min((place for place in places if place >= 0), default=None)

    def resize(self, config: Any, depths: Mapping[str, int]) -> Any:
        """The configuration with so many blocks per stack."""
        resized = copy.deepcopy(config)
        for stack, count in depths.items():
            setattr(resized, self.patterns[stack].depth, count)
        return resized


def likeliest_depth(numbers: set[int]) -> int:
    """Number of blocks of a stack for which fewest of the blocks seen are missing or too many."""
    depths = (number + 1 for number in sorted(numbers, reverse=True))
    return min(depths, key=lambda n: n - 2 * sum(seen < n for seen in numbers), default=1)
