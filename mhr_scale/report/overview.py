"""The summary section: kind, state and headline figures of every run."""

import math
from collections.abc import Sequence

from mhr_scale.adapters import CARD
from mhr_scale.errors import RunError, counted
from mhr_scale.report.page import LONGEST, Block, Cell, Prose, Section, Table
from mhr_scale.report.runs import Run
from mhr_scale.report.thinning import values_of
from mhr_scale.run.files import read_object


def overview(runs: Sequence[Run]) -> Section:
    """A table of all runs, key figures of training runs, and a warning for unfinished ones."""
    rows: list[list[Cell]] = [
        [run.label, run.kind, run.state, headline(run), run.n_rejects] for run in runs
    ]
    columns = ["run", "kind", "state", "result", "rows refused"]
    blocks: list[Block] = []
    n_open = sum(not run.is_finished for run in runs)
    if n_open:
        text = f"{n_open} of {len(runs)} runs {'is' if n_open == 1 else 'are'} unfinished."
        if len(runs) == 1:
            text = (
                f"{rows[0][0]} is unfinished ({rows[0][2]}): its numbers are what is there so far"
            )
        blocks.append(Prose(text=text, is_warning=True))
    blocks.append(Table(caption="The runs of this report", columns=columns, rows=rows))
    named = {run.label: figures for run in runs if (figures := key_figures(run))}
    if len(runs) == 1 and named:
        shown = list(named[runs[0].label].items())
        blocks.append(Table(caption="Key figures", columns=["figure", "value"], rows=shown))
    elif len(named) > 1:
        keys = list(dict.fromkeys(key for figures in named.values() for key in figures))
        table = [[label, *(figures.get(key) for key in keys)] for label, figures in named.items()]
        blocks.append(
            Table(
                caption="Training runs",
                columns=["run", *keys],
                rows=table,
                is_folded=len(table) > LONGEST,
            )
        )
    return Section(id="summary", title="Summary", blocks=blocks)


def headline(run: Run) -> str:
    """The main result of a run, in words."""
    if run.kind == "evaluation" and run.summary:
        tasks = counted(len(run.summary["tasks"]), "task")
        return f"{run.summary['mean_over_tasks']:.2f} points over {tasks}"
    if run.kind == "few-shot":
        n_tasks = len({result["task"] for result in run.results})
        n_variants = len({result["variant"] for result in run.results})
        return f"{counted(n_tasks, 'task')}, {counted(n_variants, 'variant')}"
    if "score" in run.result:
        before = run.result.get("score_before")
        started = "" if before is None else f"{before:.2f} to "
        return f"{run.result.get('metric', 'score')} {started}{run.result['score']:.2f}"
    if run.kind == "analysis" and run.analysis:
        alignment = run.analysis.get("alignment")
        return f"{run.analysis.get('method')}" + (
            f", alignment {alignment['mean']:.3f}" if alignment else ""
        )
    losses = values_of(run.lines, "validation_loss")
    if len(losses) > 1:
        return f"{run.method}, validation loss {losses[0][1]:.3f} to {losses[-1][1]:.3f}"
    return run.method if run.config else ""


def key_figures(run: Run) -> dict[str, Cell]:
    """Named figures of a training run; empty for other kinds."""
    if run.kind not in ("pre-training", "average", "fine-tuning"):
        return {}
    figures: dict[str, Cell] = {}
    if isinstance(run.config.get("adapter"), dict):
        figures["method"] = run.method
    n_trained = run.result.get("trained_numbers", trained_numbers(run))
    if n_trained is not None:
        figures["trained parameters"] = n_trained
    losses_by_task = [line.get("validation_loss_by_task") for line in run.lines]
    by_task = [losses for losses in losses_by_task if isinstance(losses, dict)]
    if by_task:
        figures["tasks"] = len(by_task[-1])
    figures["steps"] = run.lines[-1]["step"] if run.lines else 0
    losses = values_of(run.lines, "validation_loss")
    if losses:
        figures["validation loss, first"] = losses[0][1]
        figures["validation loss, last"] = losses[-1][1]
    train = values_of(run.lines, "loss")
    if train:
        figures["training loss, last"] = train[-1][1]
    pace = [value for _, value in values_of(run.lines, "tokens_per_second")]
    if pace:
        figures["tokens per second, median"] = sorted(pace)[len(pace) // 2]
    for name in ("score_before", "score"):
        if name in run.result:
            figures[name.replace("_", " ")] = run.result[name]
    return figures


def trained_numbers(run: Run) -> int | None:
    """Trained parameters of a run, from its adapter's card; None if there is no card yet.

    The adapter of an averaged run is the mean, not the inventory that was trained.
    """
    file = run.folder / "adapter" / CARD
    if run.average.get("trainable", "mean") != "mean" or not file.is_file():
        return None
    try:
        shapes = read_object(file, RunError)["tensors"].values()
        return sum(math.prod(map(int, shape)) for shape in shapes)
    except (RunError, ValueError, KeyError, TypeError, AttributeError):
        return None
