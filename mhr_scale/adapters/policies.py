"""The routing policies that a recipe may name, and what each needs; known without torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which policy turns logits into weights, and the numbers that policies read."""

    policy: str = "learned"
    temperature: float = 1.0
    """Of the relaxed Bernoulli noise."""
    random_probability: float = 0.5
    """Of a skill that is switched on at random."""
    random_empty: Literal["off", "uniform"] = "off"
    """What a row without any skill gets: no adapter, or the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A row of `POLICIES`: what the function of this name in `routing` needs.

    With `has_logits` there is a table of logits, which trains if `trains_logits`; without, the
    function sees zeros. A policy that `draws` numbers while training has a slot for each batch row
    instead of each task. `method` is its name in tables where that is not Poly's or MHR's.
    """

    has_logits: bool = True
    trains_logits: bool = True
    draws: bool = False
    method: str | None = None


POLICIES: dict[str, Policy] = {
    "learned": Policy(),
    "noisy": Policy(draws=True),
    "straight_through": Policy(),
    "uniform": Policy(has_logits=False),
    "random": Policy(has_logits=False, draws=True, method="Random"),
    "fixed": Policy(trains_logits=False),
}
