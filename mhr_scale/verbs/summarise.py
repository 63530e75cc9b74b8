"""The verb `summarise`: tables of evaluations, finished or not, from what lies in their folders.

Runs that differ in their seed only are averaged; others are set side by side, with what differs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhr_scale.errors import ConfigError, RunError, counted
from mhr_scale.recipe.reading import split_words
from mhr_scale.recipe.settings import as_written
from mhr_scale.report.runs import Run, open_runs
from mhr_scale.report.scored_adapters import find_differences, scored_adapter
from mhr_scale.run.tables import prose
from mhr_scale.scores import summary

USAGE = "mhr_scale summarise RUN [RUN ...] [--format text|markdown|csv|latex]"
#: How many differing settings are listed at most.
SHOWN = 8


def summarise_runs(arguments: Sequence[str]) -> str:
    """The table of each evaluation, and of several one table of all.

    Raises `RunError` for a folder without scores.
    """
    options, folders = split_words(arguments)
    if "--help" in options:
        return (
            f"{USAGE}\n\nRUN: the folder of an evaluation; several that differ in their seed only "
            "are averaged, others are set side by side\n"
        )
    if not folders:
        raise ConfigError(f"no run given; usage: {USAGE}")
    runs = read_runs(folders)
    text = "".join(prose(f"{run.folder}\n") + summary.table(run.summary) + "\n" for run in runs)
    return text + (together(runs) if len(folders) > 1 else "")


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The evaluations in some folders; raises `RunError` for one without scores."""
    twice = {Path(folder).resolve() for folder in folders}
    if len(twice) < len(folders):
        raise ConfigError(f"a folder is named twice: {' '.join(folders)}; name each once")
    for folder in folders:
        check_scores(Path(folder), (Path(folder) / summary.SCORES).is_file())
    runs = open_runs(folders)
    for run in runs:
        check_scores(run.folder, bool(run.summary))
    return runs


def check_scores(folder: Path, is_there: bool) -> None:
    """Raise `RunError` for a folder that holds no score."""
    if not is_there:
        raise RunError(
            f"{folder / summary.SCORES}: no scores here; name the folder of an evaluation"
        )


def together(runs: Sequence[Run]) -> str:
    """The aggregates of runs that are seeds of one setting; of others a table side by side."""
    summaries = {run.label: run.summary for run in runs}
    reasons = why_apart(runs)
    if reasons:
        listed = "".join(f"  {reason}\n" for reason in reasons[:SHOWN])
        rest = len(reasons) - SHOWN
        listed += f"  and {counted(rest, 'further difference')}\n" if rest > 0 else ""
        words = (
            f"not averaged: {counted(len(runs), 'run')} that are not seeds of one setting\n{listed}"
        )
        return f"{summary.side_by_side(summaries)}\n{prose(words)}"
    aggregates = summary.aggregate(list(summaries.values()))
    mean, deviation = aggregates["mean_then_std"]
    return prose(
        f"{aggregates['seeds']} seeds: median over seeds per task, mean over tasks "
        f"{aggregates['median_then_mean']:.2f}; mean over tasks {mean:.2f} +- {deviation:.2f} "
        "(standard deviation over seeds)\n"
    )


def why_apart(runs: Sequence[Run]) -> list[str]:
    """Why runs are no seeds of one setting, in lines; none if they are."""
    silent = [f"{run.label}: no config.yaml says what it scored" for run in runs if not run.config]
    if silent:
        return silent
    adapters = {run.label: scored_adapter(run, runs) for run in runs}
    reasons = find_differences(adapters)
    reasons += [f"{run.label}: {run.state}" for run in runs if not run.is_finished]
    first = runs[0]
    for run in runs[1:]:
        if what_was_asked(run) != what_was_asked(first):
            reasons.append(f"{run.label}: other tasks or examples than {first.label}")
    for number, run in enumerate(runs):
        for other in runs[:number]:
            seeds = adapters[run.label].seeds
            if not reasons and seeds == adapters[other.label].seeds:
                said = ", ".join(f"{key} {as_written(value)}" for key, value in seeds.items())
                reasons.append(f"{run.label}: the same seed as {other.label} ({said or 'none'})")
    return reasons


def what_was_asked(run: Run) -> dict[str, Any]:
    """Number of examples and metric of every task."""
    return {name: (task["examples"], task["metric"]) for name, task in run.summary["tasks"].items()}
