"""Measures read from the files of finished units: one number per measure and seed.

few_shot/<way>              mean score over the held-out tasks
zero_shot/<way>/<k>         the same without training examples, after k extra steps
alignment/<regime>/<method> mean gradient cosine over pairs of training tasks
loss/<regime>/<method>      validation loss on the training tasks, at the end
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhr_scale.analysis import ANALYSIS
from mhr_scale.errors import RunError
from mhr_scale.jobs.job import read_all_results
from mhr_scale.run.files import read_object
from mhr_scale.run.runlog import read_metric
from mhr_scale.scores.comparison import compare
from reproduction.study_suites import Method, StudySuite
from reproduction.units_to_run import seed_part, unit_name

WAY_OUT = "delete its folder and run again"


@dataclass(slots=True)
class Measured:
    """All numbers of a suite."""

    values: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """By measure and seed."""
    per_task: dict[str, dict[int, dict[str, float]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """By few-shot measure, seed and task."""
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By few-shot measure: parameters trained on all tasks together, and on one new task."""

    def paired(self, *measures: str) -> tuple[list[int], list[list[float]]]:
        """The seeds that all measures have, and the values of each over them."""
        columns = [self.values.get(measure, {}) for measure in measures]
        seeds = sorted(set.intersection(*(set(values) for values in columns)))
        return seeds, [[values[seed] for seed in seeds] for values in columns]

    def to_json(self) -> dict[str, Any]:
        """Every number with its seed."""
        return {
            "measures": {name: _by_seed(values) for name, values in sorted(self.values.items())},
            "per_task": {name: _by_seed(values) for name, values in sorted(self.per_task.items())},
            "parameters": {
                name: {"multi_task": counts[0], "adaptation": counts[1]}
                for name, counts in sorted(self.parameters.items())
            },
        }


def _by_seed(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(seed): value for seed, value in sorted(values.items())}


def measure(suite: StudySuite, root: Path, fates: Mapping[str, str]) -> Measured:
    """Read the results of the finished units of the study."""
    measured = Measured()
    for seed in suite.seeds:
        for method in suite.methods:
            _few_shot(measured, suite, method, seed, root, fates)
            for key, value in _scalars(suite, method, seed, root, fates):
                measured.values[key][seed] = value
    return measured


def _few_shot(
    measured: Measured,
    suite: StudySuite,
    method: Method,
    seed: int,
    root: Path,
    fates: Mapping[str, str],
) -> None:
    name = unit_name(suite, seed_part(seed), "adapt", suite.regimes[0], method.name)
    if fates.get(name) != "done":
        return
    for way, values in compare(read_all_results(root / name))["variants"].items():
        key = f"few_shot/{way}"
        measured.values[key][seed] = values["mean"]
        measured.per_task[key][seed] = values["median_per_task"]  # a unit has one seed
        measured.parameters[key] = (values["multi_task_numbers"], values["adaptation_numbers"])


def _scalars(
    suite: StudySuite, method: Method, seed: int, root: Path, fates: Mapping[str, str]
) -> Iterator[tuple[str, float]]:
    part = seed_part(seed)
    for k in suite.steps if method.name in suite.zero_shot else ():
        name = unit_name(suite, part, "evaluate", suite.regimes[-1], method.name, k)
        if fates.get(name) == "done":
            yield f"zero_shot/{suite.zero_shot[method.name]}/{k}", zero_shot_score(root / name)
    for regime in suite.regimes:
        name = unit_name(suite, part, "analyse", regime, method.name)
        if fates.get(name) == "done":
            yield f"alignment/{regime}/{method.name}", alignment(root / name)
        name = unit_name(suite, part, "pretrain", regime, method.name)
        if fates.get(name) == "done":
            losses = read_metric(root / name / "metrics.jsonl", "validation_loss")
            yield from ((f"loss/{regime}/{method.name}", float(loss)) for loss in losses[-1:])


def zero_shot_score(folder: Path) -> float:
    """Mean score over tasks of an evaluation."""
    return float(read_object(folder / "summary.json", RunError, way_out=WAY_OUT)["mean_over_tasks"])


def alignment(folder: Path) -> float:
    """Mean cosine of an analysis; raises `RunError` where it has none."""
    measured = read_object(folder / ANALYSIS, RunError, way_out=WAY_OUT)["alignment"]
    if measured is None:
        raise RunError(f"{folder / ANALYSIS}: holds no gradient alignment; delete {folder}")
    return float(measured["mean"])
