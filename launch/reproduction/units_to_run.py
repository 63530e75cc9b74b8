"""The units of work, and what each of them needs.

    <suite>/search/pretrain/<regime>/<method>/<rate>      and adapt/..., average/..., evaluate/...
    <suite>/seed<n>/pretrain/<regime>/<method>            and adapt/..., average/..., evaluate/...,
                                                          analyse/...

A unit is one call of a verb; its name is its run folder. Search units come first: the units of the
study use the rates that are chosen from them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from reproduction.study_suites import SEARCH_SEED, Grid, Kind, Method, StudySuite
from reproduction.study_tasks import Data, Overrides

#: Stands in the names of search units where those of the study have a seed.
SEARCH = "search"

Verb = Literal["pretrain", "adapt", "average", "evaluate", "analyse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One call of a verb on a recipe."""

    name: str
    verb: Verb
    recipe: str
    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()
    seconds: float
    """Its expected time on one core."""
    may_diverge: bool = False
    """Whether a loss that is not finite is a result (of a rate that is tried), not a failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Peak learning rates of one way to adapt."""

    lr: float
    routing_lr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """The learning rates of a family of methods."""

    pretrain: dict[str, float]
    """Of the inventory in pre-training, by regime."""
    adapt: dict[Kind, Rate]


def candidates(method: Method, kind: Kind, grid: Grid) -> dict[str, Rate]:
    """The rates that are tried for one way to adapt a method, by the name of their variant."""
    lrs = grid.adapt if kind != "routing" else grid.adapt[:1]  # only routing is trained
    has_logits = method.is_routed and kind in ("full", "routing")
    routing = grid.routing if has_logits else grid.routing[:1]
    return {
        f"{kind} {lr:g} {routing_lr:g}": Rate(lr=lr, routing_lr=routing_lr)
        for lr, routing_lr in product(lrs, routing)
    }


def unit_name(suite: StudySuite, part: str, verb: Verb, *rest: object) -> str:
    """The name of a unit; `part` is `search` or a seed."""
    return "/".join([suite.name, part, verb, *(str(word) for word in rest)])


def seed_part(seed: int) -> str:
    """The part of a unit's name that a seed of the study has."""
    return f"seed{seed}"


def search_units(suite: StudySuite, data: Data, root: Path) -> list[Unit]:
    """The units whose results decide the rates of every searched method."""
    planner = _Planner(suite, data.search, root, SEARCH, SEARCH_SEED, may_diverge=True)
    units: list[Unit] = []
    few, zero = suite.regimes[0], suite.regimes[-1]
    for method, lr in product(suite.searched, suite.grid.pretrain):
        tail = (method.name, f"{lr:g}")
        units.append(planner.pretrain(method, few, lr, *tail))
        ways: dict[str, tuple[Kind, Rate]] = {
            name: (kind, rate)
            for kind in method.ways.values()
            for name, rate in candidates(method, kind, suite.grid).items()
        }
        units.append(planner.adapt(method, few, ways, *tail))
        if zero != few and method.name in suite.zero_shot:
            units.append(planner.pretrain(method, zero, lr, *tail))
            units += planner.zero_shot(method, zero, *tail)
    return units


def study_units(suite: StudySuite, data: Data, root: Path, rates: dict[str, Rates]) -> list[Unit]:
    """The units of all seeds, for the methods whose family has rates."""
    units: list[Unit] = []
    for seed in suite.seeds:
        planner = _Planner(suite, data.study(seed), root, seed_part(seed), seed)
        for method in suite.methods:
            if method.family in rates:
                units += _study_method(planner, method, rates[method.family])
    return units


def _study_method(planner: "_Planner", method: Method, rates: Rates) -> Iterator[Unit]:
    suite = planner.suite
    few, zero = suite.regimes[0], suite.regimes[-1]
    ways = {name: (kind, rates.adapt[kind]) for name, kind in method.ways.items()}
    yield planner.pretrain(method, few, rates.pretrain[few], method.name)
    yield planner.adapt(method, few, ways, method.name)
    is_aligned, is_zero_shot = method.name in suite.aligned, method.name in suite.zero_shot
    if zero != few and (is_aligned or is_zero_shot):
        yield planner.pretrain(method, zero, rates.pretrain[zero], method.name)
    if is_zero_shot:
        yield from planner.zero_shot(method, zero, method.name)
    for regime in suite.regimes if is_aligned else ():
        yield planner.analyse(regime, method.name)


@dataclass(frozen=True, slots=True)
class _Planner:
    """Makes the units of one suite, part and seed."""

    suite: StudySuite
    tasks: Overrides
    root: Path
    part: str
    seed: int
    may_diverge: bool = False

    def pretrain(self, method: Method, regime: str, lr: float, *tail: str) -> Unit:
        settings = (f"run.seed={self.seed}", f"optim.lr={lr!r}", *method.settings)
        return self._unit("pretrain", regime, tail, (*settings, *self._inputs(method, regime)))

    def adapt(
        self, method: Method, regime: str, ways: dict[str, tuple[Kind, Rate]], *tail: str
    ) -> Unit:
        source = self._name("pretrain", regime, tail)
        variants: dict[str, dict[str, Any]] = {
            name: {
                "adapter": str(self.root / source),
                "kind": kind,
                "lr": rate.lr,
                "routing_lr": rate.routing_lr,
            }
            for name, (kind, rate) in ways.items()
        }
        settings = (f"variants={json.dumps(variants)}", f"shots.seeds=[{self.seed}]")
        inputs = self._inputs(method, regime)
        n_tasks = self.suite.n_search if self.part == SEARCH else self.suite.n_held_out
        times = len(ways) * n_tasks
        return self._unit("adapt", regime, tail, (*settings, *inputs), source, times=times)

    def zero_shot(self, method: Method, regime: str, *tail: str) -> Iterator[Unit]:
        """Averaging, with all numbers of extra steps, and an evaluation after each of them."""
        source, mean = self._name("pretrain", regime, tail), self._name("average", regime, tail)
        steps = self.suite.steps
        settings = (f"source={self.root / source}", f"steps={list(steps)}", f"run.seed={self.seed}")
        yield self._unit("average", regime, tail, settings, source)
        for k in steps:
            place = self.root / mean / "averaged" / f"{k:06d}"
            inputs = (f"adapter={place}", *self._inputs(method, regime))
            yield self._unit("evaluate", regime, (*tail, str(k)), inputs, mean)

    def analyse(self, regime: str, *tail: str) -> Unit:
        source = self._name("pretrain", regime, tail)
        return self._unit("analyse", regime, tail, (f"adapter={self.root / source}",), source)

    def _inputs(self, method: Method, regime: str) -> tuple[str, ...]:
        """The override for the instruction in inputs of the toy suite."""
        if self.suite.name != "toy":
            return ()
        return (f"tasks.instruction={method.instruction or regime}",)

    def _name(self, verb: Verb, regime: str, tail: tuple[str, ...]) -> str:
        return unit_name(self.suite, self.part, verb, regime, *tail)

    def _unit(
        self,
        verb: Verb,
        regime: str,
        tail: tuple[str, ...],
        settings: tuple[str, ...],
        *needs: str,
        times: int = 1,
    ) -> Unit:
        suite = self.suite
        return Unit(
            name=self._name(verb, regime, tail),
            verb=verb,
            recipe=f"{suite.name}_{verb}.yaml",
            settings=(*settings, *self.tasks.get(verb, ()), *suite.overrides.get(verb, ())),
            needs=needs,
            seconds=suite.seconds[verb] * times,
            may_diverge=self.may_diverge,
        )
