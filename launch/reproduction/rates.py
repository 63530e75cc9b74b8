"""The choice of learning rates from the scores on the search tasks.

A family's pre-training rate is the one with the highest mean, over its ways to adapt, of each way's
best score; the rates of each way are the best ones at that pre-training rate. A rate that diverged
on any task is never chosen. Of equal scores the lower rate wins. For zero-shot, where inputs differ
from those of few-shot, it is the pre-training rate with the highest mean score over the numbers of
extra steps.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mhr_scale.jobs.job import read_all_results
from mhr_scale.run.runlog import log
from mhr_scale.scores.comparison import compare
from reproduction.results import zero_shot_score
from reproduction.study_suites import Kind, Method, StudySuite
from reproduction.units_to_run import SEARCH, Rate, Rates, candidates, unit_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One point of the grid and its score; None if it diverged or is missing."""

    family: str
    regime: str
    way: str
    """The kind of adaptation, or `zero-shot`."""
    pretrain_lr: float
    lr: float | None
    routing_lr: float | None
    score: float | None


def read_trials(suite: StudySuite, root: Path, fates: Mapping[str, str]) -> list[Trial]:
    """Every point of the grid, of all searched methods."""
    trials: list[Trial] = []
    for method in suite.searched:
        for lr in suite.grid.pretrain:
            trials += _few_shot(suite, method, lr, root, fates)
            if len(suite.regimes) > 1 and method.name in suite.zero_shot:
                trials.append(_zero_shot(suite, method, lr, root, fates))
    return trials


def _few_shot(
    suite: StudySuite, method: Method, lr: float, root: Path, fates: Mapping[str, str]
) -> list[Trial]:
    regime = suite.regimes[0]
    name = unit_name(suite, SEARCH, "adapt", regime, method.name, f"{lr:g}")
    is_there = fates.get(name) in ("done", "diverged") and (root / name).is_dir()
    variants = compare(read_all_results(root / name))["variants"] if is_there else {}
    trials = []
    for kind in dict.fromkeys(method.ways.values()):
        for variant, rate in candidates(method, kind, suite.grid).items():
            values = variants.get(variant, {})
            is_complete = values.get("seeds") and not values["incomplete_seeds"]
            trials.append(
                Trial(
                    family=method.name,
                    regime=regime,
                    way=kind,
                    pretrain_lr=lr,
                    lr=rate.lr,
                    routing_lr=rate.routing_lr,
                    score=values["mean"] if is_complete else None,
                )
            )
    return trials


def _zero_shot(
    suite: StudySuite, method: Method, lr: float, root: Path, fates: Mapping[str, str]
) -> Trial:
    regime = suite.regimes[-1]
    tail = (regime, method.name, f"{lr:g}")
    names = [unit_name(suite, SEARCH, "evaluate", *tail, k) for k in suite.steps]
    is_complete = all(fates.get(name) == "done" for name in names)
    return Trial(
        family=method.name,
        regime=regime,
        way="zero-shot",
        pretrain_lr=lr,
        lr=None,
        routing_lr=None,
        score=fmean(zero_shot_score(root / name) for name in names) if is_complete else None,
    )


def choose(suite: StudySuite, trials: list[Trial]) -> dict[str, Rates]:
    """The rates of every family with a score for all its ways; the log names the others."""
    chosen: dict[str, Rates] = {}
    for method in suite.searched:
        rates = _choose(method, [trial for trial in trials if trial.family == method.name], suite)
        if rates is None:
            log.error("%s: no rate of %s has a score for every way", suite.name, method.name)
        else:
            chosen[method.name] = rates
    return chosen


def _choose(method: Method, trials: list[Trial], suite: StudySuite) -> Rates | None:
    kinds: list[Kind] = list(dict.fromkeys(method.ways.values()))
    best: dict[float, dict[Kind, Trial]] = {}
    for lr in suite.grid.pretrain:
        tops = {
            kind: _top([t for t in trials if t.way == kind and t.pretrain_lr == lr])
            for kind in kinds
        }
        scored = {kind: trial for kind, trial in tops.items() if trial is not None}
        if len(scored) == len(kinds):
            best[lr] = scored
    if not best:
        return None
    few = max(best, key=lambda lr: (fmean(_score(t) for t in best[lr].values()), -lr))
    pretrain = dict.fromkeys(suite.regimes, few)
    zero = _top([trial for trial in trials if trial.way == "zero-shot"])
    if zero is not None:
        pretrain[zero.regime] = zero.pretrain_lr
    adapt = {
        kind: Rate(lr=float(trial.lr or 0.0), routing_lr=float(trial.routing_lr or 0.0))
        for kind, trial in best[few].items()
    }
    return Rates(pretrain=pretrain, adapt=adapt)


def _top(trials: list[Trial]) -> Trial | None:
    """The trial with the highest score; of equal ones, the one with the lowest rates."""
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        return None
    return max(
        scored, key=lambda t: (_score(t), -t.pretrain_lr, -(t.lr or 0.0), -(t.routing_lr or 0.0))
    )


def _score(trial: Trial) -> float:
    assert trial.score is not None
    return trial.score


def to_json(trials: list[Trial], chosen: Mapping[str, Rates]) -> dict[str, Any]:
    """All trials of the grid, and the rates chosen from it."""
    return {
        "trials": [asdict(trial) for trial in trials],
        "chosen": {family: asdict(rates) for family, rates in chosen.items()},
    }
