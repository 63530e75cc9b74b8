"""Thinning of long curves to as many points as a picture can show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Points of a curve at most; neighbours of longer ones are merged.
MOST_POINTS = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinned:
    """A quantity over steps: points, and the range of the values behind each."""

    steps: list[int]
    values: list[float]
    low: list[float]
    high: list[float]
    per_point: int
    """Logged values per point; 1: not thinned."""
    odd: list[tuple[int, float]]
    """Steps whose value is not finite, which no picture shows."""


def values_of(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """The logged values of a quantity, by step."""
    return [
        (line["step"], float(line[name]))
        for line in lines
        if isinstance(line.get(name), int | float) and not isinstance(line[name], bool)
    ]


def thin(points: Sequence[tuple[int, float]], *, most: int = MOST_POINTS) -> Thinned:
    """The means of neighbouring values, at their last step, if there are more than `most`."""
    odd = [(step, value) for step, value in points if not math.isfinite(value)]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    size = max(1, math.ceil(len(finite) / most))
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    columns = [[value for _, value in group] for group in groups]
    return Thinned(
        steps=[group[-1][0] for group in groups],
        values=[math.fsum(column) / len(column) for column in columns],
        low=[min(column) for column in columns] if size > 1 else [],
        high=[max(column) for column in columns] if size > 1 else [],
        per_point=size,
        odd=odd,
    )
