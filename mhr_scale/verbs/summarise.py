"""The verb `summarise`: tables of evaluations, finished or not, from their `scores.jsonl` alone."""

from collections.abc import Sequence
from pathlib import Path

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe.reading import split_words
from mhr_scale.scores import summary

USAGE = "python launch/summarise.py RUN [RUN ...]"


def summarise_runs(arguments: Sequence[str]) -> str:
    """The table of each evaluation; of several, taken as seeds of one setting, their aggregates.

    Raises `RunError` for a folder without scores or seeds that hold different tasks.
    """
    options, folders = split_words(arguments)
    if "--help" in options:
        return f"{USAGE}\n\nRUN: the folder of an evaluation; several are seeds of one setting\n"
    if not folders:
        raise ConfigError(f"no run given; usage: {USAGE}")
    text, summaries = "", []
    for folder in folders:
        path = Path(folder) / summary.SCORES
        scores = summary.read_scores(path)
        if not scores:
            raise RunError(f"{path}: no scores here; name the folder of an evaluation")
        summaries.append(summary.summarise(scores))
        text += f"{folder}\n{summary.table(summaries[-1])}\n"
    if len(summaries) > 1:
        aggregates = summary.aggregate(summaries)
        mean, deviation = aggregates["mean_then_std"]
        text += (
            f"{aggregates['seeds']} seeds: median over seeds per task, mean over tasks "
            f"{aggregates['median_then_mean']:.2f}; mean over tasks {mean:.2f} +- {deviation:.2f} "
            "(standard deviation over seeds)\n"
        )
    return text
