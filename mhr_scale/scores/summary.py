"""Summaries of scores: per task, per prompt, means over tasks, and over seeds.

`scores.jsonl` is the only source: a summary can be computed again at any time. Every score is
in points, 0 to 100, or from -100 where it is a correlation. The `mean` of a task is its score: of
the metrics that only all answers together have, that one.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhr_scale.errors import RunError, one_line, some
from mhr_scale.run.tables import render
from mhr_scale.tasks.crossfit.metrics import is_mean
from mhr_scale.tasks.metrics import score_of

SCORES = "scores.jsonl"


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The lines of a scores file, each global id once.

    An incomplete last line, left by a run that was stopped, is skipped. Raises `RunError` for any
    other line that is not a score.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); move it away") from error
    scores: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            score = json.loads(line.decode("utf-8"))
            _check_score(score)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise RunError(f"{path}:{number}: not a score ({error}); remove the line") from error
        scores.setdefault(score["id"], score)
    return list(scores.values())


def _check_score(score: Any) -> None:
    """Raise `KeyError`, `TypeError` or `ValueError` for a line that is not a score."""
    for name in ("id", "task", "prompt", "metric"):
        if not isinstance(score[name], str):
            raise TypeError(f"{name} is {score[name]!r}, no text")
    if not isinstance(score.get("choice_scores", []), list):
        raise TypeError(f"choice_scores are {score['choice_scores']!r}, no list")
    if not math.isfinite(score["points"]):
        raise ValueError(f"points are {score['points']}")
    if not is_mean(score["metric"]):
        texts = [score["prediction"], *score["references"]]
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{score['metric']} is of an answer and its references, no texts")


def raw_row(score: Mapping[str, Any]) -> str:
    """What a score is of, the same one under all prompts of a row."""
    name = str(score.get("example", score["id"]))
    return name.removesuffix(f"/{score['prompt']}") if score["prompt"] else name


def summarise(scores: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Means per task and prompt, spread over prompts, and means over tasks and examples.

    A row under several prompts counts as one example. The order of the lines does not matter, nor
    do repeated lines.
    """
    by_task: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for score in scores:
        by_task[score["task"]].setdefault(score["id"], score)
    tasks = {name: _of_task(list(lines.values())) for name, lines in sorted(by_task.items())}
    n_examples = sum(task["examples"] for task in tasks.values())
    total = sum(task["mean"] * task["examples"] for task in tasks.values())
    return {
        "tasks": tasks,
        "mean_over_tasks": _mean([task["mean"] for task in tasks.values()]),
        "mean_over_examples": total / n_examples if n_examples else None,
        "examples": n_examples,
    }


def _of_task(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What one task's scores say; `chance` is what guessing gives, where all rows are ranked."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for score in scores:
        by_prompt[score["prompt"]].append(score)
    prompts = {prompt: score_of(lines) for prompt, lines in sorted(by_prompt.items())}
    summary: dict[str, Any] = {
        "metric": scores[0]["metric"],
        "examples": len({raw_row(score) for score in scores}),
        "mean": score_of(scores),
    }
    n_choices = [len(score["choice_scores"]) for score in scores if score.get("choice_scores")]
    if len(n_choices) == len(scores):
        summary["chance"] = 100.0 * sum(1.0 / count for count in n_choices) / len(scores)
    if len(prompts) > 1:
        means = list(prompts.values())
        summary |= {
            "prompts": prompts,
            "prompt_mean": _mean(means),
            "prompt_median": statistics.median(means),
            "prompt_spread": max(means) - min(means),
        }
    return summary


def aggregate(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Aggregates over seeds of one setting, in both ways of the reference (docs/method.md 12).

    `median_then_mean`: median over seeds per task, then mean over tasks (R2). `mean_then_std`: mean
    over tasks per seed, then mean and standard deviation over seeds (R1, the paper's +-). Raises
    `RunError` if the seeds do not hold the same tasks.
    """
    names = set(summaries[0]["tasks"])
    for summary in summaries[1:]:
        odd = sorted(names ^ set(summary["tasks"]))
        if odd:
            raise RunError(
                f"seeds differ in their tasks: {some(odd, shown=5)}; name runs of the same tasks"
            )
    medians = {
        name: statistics.median(summary["tasks"][name]["mean"] for summary in summaries)
        for name in sorted(names)
    }
    means = [summary["mean_over_tasks"] for summary in summaries]
    return {
        "seeds": len(summaries),
        "median_per_task": medians,
        "median_then_mean": _mean(list(medians.values())),
        "mean_then_std": [_mean(means), statistics.stdev(means) if len(means) > 1 else 0.0],
    }


def table(summary: Mapping[str, Any]) -> str:
    """A summary as a table."""
    tasks = summary["tasks"].values()
    optional = {
        "chance": [task.get("chance") for task in tasks],
        "median over prompts": [task.get("prompt_median") for task in tasks],
        "spread": [task.get("prompt_spread") for task in tasks],
    }
    shown = {head: cells for head, cells in optional.items() if any(c is not None for c in cells)}
    rows = [
        [one_line(name), task["metric"], str(task["examples"]), _points(task["mean"]), *more]
        for (name, task), *more in zip(
            summary["tasks"].items(),
            *([_points(cell, none="") for cell in cells] for cells in shown.values()),
            strict=True,
        )
    ]
    for key in ("mean_over_tasks", "mean_over_examples"):
        row = [key.replace("_", " "), "", "", _points(summary[key]), *[""] * len(shown)]
        if "chance" in shown and key == "mean_over_tasks":
            row[4] = _points(mean_chance(summary))
        rows.append(row)
    return render(["task", "metric", "examples", "mean", *shown], rows)


def mean_chance(summary: Mapping[str, Any]) -> float | None:
    """What guessing gives over all tasks; None if a task has no choices."""
    chances = [task.get("chance") for task in summary["tasks"].values()]
    return None if None in chances else _mean(chances)


def side_by_side(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Several summaries as one table, a column for each by its name, and what guessing gives."""
    tasks = sorted({name for summary in summaries.values() for name in summary["tasks"]})
    columns = [
        [name, *(one["tasks"].get(task, {}).get("mean") for task in tasks), one["mean_over_tasks"]]
        for name, one in summaries.items()
    ]
    asked = {name: task for one in summaries.values() for name, task in one["tasks"].items()}
    chances = [asked[task].get("chance") for task in tasks]
    if any(chance is not None for chance in chances):
        columns.append(["chance", *chances, mean_chance({"tasks": asked})])
    names = ["task", *map(one_line, tasks), "mean over tasks"]
    head, *rows = zip(names, *(map(_points, column) for column in columns), strict=True)
    return render(head, rows)


def _points(value: Any, *, none: str = "-") -> str:
    """A score as tables show it; a head as it is, and `none` where there is no score."""
    if isinstance(value, str):
        return value
    return none if value is None else f"{value:.2f}"


def _mean(values: Sequence[float]) -> Any:
    return sum(values) / len(values) if values else None
