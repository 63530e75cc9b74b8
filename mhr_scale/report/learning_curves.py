"""Sections of learning curves: losses, rates, norms, alignment; validation loss by task."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mhr_scale.errors import counted, some
from mhr_scale.report.drawing import COLOURS, DASHES, MOST_SERIES, short
from mhr_scale.report.page import Block, Cell, Picture, Prose, Section, Table
from mhr_scale.report.pictures import Curve, Series, curves, panels, pictured
from mhr_scale.report.runs import Run, part
from mhr_scale.report.thinning import MOST_POINTS, Thinned, thin, values_of

#: Up to this many runs, tables of losses by task have the first and the last; else the last only.
MOST_ENDS = 3
#: Quantities of the small pictures besides the loss, and their axis labels.
PANELS = {
    "lr": "learning rate",
    "lr_inventory": "learning rate, inventory",
    "lr_routing": "learning rate, routing",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A quantity of a run over steps, thinned for drawing."""

    run: Run
    what: str
    points: Thinned


def look_of(runs: Sequence[Run]) -> dict[str, tuple[int, str]]:
    """Look and name of each run's lines, by label; many runs have one for each method."""
    methods = list(dict.fromkeys(run.method for run in runs))
    n_looks = len(COLOURS) * len(DASHES)
    if len(runs) > MOST_SERIES and 1 < len(methods) < len(runs) and len(methods) <= n_looks:
        return {run.label: (methods.index(run.method), run.method) for run in runs}
    return {run.label: (number, short(run.label)) for number, run in enumerate(runs)}


def gather(runs: Iterable[Run], names: Iterable[str]) -> list[Line]:
    """The lines of the given quantities, for runs that have logged them."""
    lines = [
        Line(run=run, what=name, points=thin(values_of(run.lines, name)))
        for name in names
        for run in runs
    ]
    return [line for line in lines if line.points.steps or line.points.odd]


def draw(
    lines: Sequence[Line], looks: dict[str, tuple[int, str]], *, is_marked: bool = False
) -> list[Curve]:
    """The curves of a picture, one for each line."""
    return [
        Curve(
            name=looks[line.run.label][1],
            x=line.points.steps,
            y=line.points.values,
            low=line.points.low,
            high=line.points.high,
            look=looks[line.run.label][0],
            is_marked=is_marked,
        )
        for line in lines
        if line.points.steps
    ]


def numbers(lines: Sequence[Line], caption: str) -> Table:
    """The points of lines as a table, one row for each run and step."""
    whats = list(dict.fromkeys(line.what for line in lines))
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines:
        shown = zip(line.points.steps, line.points.values, strict=True)
        for step, value in [*shown, *line.points.odd]:
            rows.setdefault((line.run.label, step), {})[line.what] = value
    order = {line.run.label: number for number, line in enumerate(lines)}
    keys = sorted(rows, key=lambda key: (order[key[0]], key[1]))
    cells: list[list[Cell]] = [
        [label, step, *(rows[label, step].get(what) for what in whats)] for label, step in keys
    ]
    return Table(caption=caption, columns=["run", "step", *whats], rows=cells)


def thinned_note(lines: Sequence[Line]) -> str:
    """How long curves were thinned; empty if none was."""
    most = max((line.points.per_point for line in lines), default=1)
    if most == 1:
        return ""
    return (
        f" Curves of more than {MOST_POINTS} logged values are thinned: a point is the mean of up "
        f"to {most} neighbouring values, the band their range."
    )


def oddities(lines: Sequence[Line]) -> list[Block]:
    """A warning for every line with values that are not finite."""
    return [
        Prose(
            text=f"{line.run.label}: {line.what} is not finite at "
            + some((f"step {step:,} ({value})" for step, value in line.points.odd), shown=5),
            is_warning=True,
        )
        for line in lines
        if line.points.odd
    ]


def learning(runs: Sequence[Run]) -> Section | None:
    """Pictures of training and validation loss, and small ones of other quantities."""
    runs = [run for run in runs if run.lines]
    if not runs:
        return None
    looks = look_of(runs)
    blocks: list[Block] = []
    train = gather(runs, ["loss"])
    validation = gather(runs, ["validation_loss"])
    unit = loss_unit(runs)
    for lines, what in ((train, "Training loss"), (validation, "Validation loss")):
        blocks += oddities(lines)
        drawn = draw(lines, looks, is_marked=lines is validation)
        if not any(len(curve.x) > 1 for curve in drawn):
            continue
        svg = curves(drawn, title=f"{what} over steps", x="step", y=f"{what.lower()} ({unit})")
        where = "on held-out rows of the training tasks" if lines is validation else "of a batch"
        caption = f"{what}, {where}.{thinned_note(lines)}"
        blocks.append(Picture(caption=caption, svg=svg, data=numbers(lines, what)))
    small = gather(runs, PANELS)
    blocks += oddities(small)
    drawn_panels = {
        label: draw([line for line in small if line.what == what], looks)
        for what, label in PANELS.items()
    }
    drawn_panels = {
        label: lines
        for label, lines in drawn_panels.items()
        if any(len(curve.x) > 1 for curve in lines)
    }
    if drawn_panels:
        svg = panels(
            drawn_panels, title="Learning rates, gradient norm and pace over steps", x="step"
        )
        caption = "Learning rates, gradient norm before clipping, and pace." + thinned_note(small)
        blocks.append(Picture(caption=caption, svg=svg, data=numbers(small, "Rates and norms")))
    blocks += alignment_over_steps(runs, looks)
    torn = [f"{run.label}: {run.n_torn}" for run in runs if run.n_torn]
    if torn:
        blocks.append(Prose(text=f"Torn lines left out: {', '.join(torn)}.", is_warning=True))
    return Section(id="learning", title="Learning curves", blocks=blocks) if blocks else None


def loss_unit(runs: Sequence[Run]) -> str:
    """The unit of the losses."""
    ways = {str(part(run.config, "loss").get("normalise", "tokens")) for run in runs}
    return "nats per token" if ways == {"tokens"} else "nats"


def alignment_over_steps(runs: Sequence[Run], looks: dict[str, tuple[int, str]]) -> list[Block]:
    """Gradient alignment as logged by the monitor of pre-training, if there is any."""
    lines = gather(runs, ["alignment"])
    drawn = draw(lines, looks, is_marked=True)
    blocks = oddities(lines)
    if drawn:
        tasks = sorted({n for run in runs for _, n in values_of(run.lines, "alignment_tasks")})
        counts = ", ".join(f"{n:.0f}" for n in tasks)
        among = f" among {counts} task{'' if counts == '1' else 's'}" if tasks else ""
        data = numbers(lines, "Alignment over steps")
        if all(len(curve.x) == 1 for curve in drawn):
            return [*blocks, data]
        svg = curves(
            drawn, title="Gradient alignment over steps", x="step", y="mean cosine", height=2.3
        )
        caption = f"Gradient alignment while training: mean cosine of task gradients{among}."
        blocks.append(Picture(caption=caption, svg=svg, data=data))
    return blocks


def by_task(runs: Sequence[Run]) -> Section | None:
    """Validation loss of every task at the end, highest first."""
    key = "validation_loss_by_task"
    logged_by_run: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        lines = [losses for line in run.lines if (losses := numbers_of(line.get(key)))]
        if lines:
            logged_by_run[run.label] = lines
    if not logged_by_run:
        return None
    last = {label: logged[-1] for label, logged in logged_by_run.items()}
    names = list(dict.fromkeys(name for values in last.values() for name in values))
    first = next(iter(last.values()))
    names.sort(key=lambda name: (-first.get(name, float("-inf")), name))
    columns: dict[str, dict[str, float]] = {}
    for label, logged in logged_by_run.items():
        if len(logged_by_run) > MOST_ENDS:
            columns[label] = logged[-1]
            continue
        if len(logged) > 1:
            columns[f"{label}, first"] = logged[0]
        columns[f"{label}, last"] = logged[-1]
    cells: list[list[Cell]] = [
        [name, *(losses.get(name) for losses in columns.values())] for name in names
    ]
    table = Table(
        caption="Validation loss by task", columns=["task", *columns], rows=cells, decimals=4
    )
    looks = look_of([run for run in runs if run.label in last])
    series, many = as_series(last, looks)
    caption = (
        f"Validation loss of {counted(len(names), 'task')} after the last logged validation{many}"
    )
    caption += f", in the order of {next(iter(last))}."
    title, unit = "Validation loss by task", "validation loss (nats/token)"
    picture = pictured(series, names, table, title=title, caption=caption, x=unit)
    return Section(id="validation-by-task", title="Validation loss by task", blocks=[picture])


def numbers_of(values: object) -> dict[str, float]:
    """The numbers in an object of a log line; empty for anything else."""
    items = values.items() if isinstance(values, dict) else ()
    return {name: float(value) for name, value in items if isinstance(value, int | float)}


def as_series(
    last: Mapping[str, Mapping[str, float]], looks: Mapping[str, tuple[int, str]]
) -> tuple[list[Series], str]:
    """A series for each run, or for each method if there are many runs; and a note for the caption.

    Runs of one method become their mean and standard deviation.
    """
    if len(last) <= MOST_SERIES:
        return [
            Series(name=label, values=losses_by_task, errors={})
            for label, losses_by_task in last.items()
        ], ""
    groups: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for label, losses_by_task in last.items():
        groups[looks[label][1]].append(losses_by_task)
    if len(groups) > MOST_SERIES:
        shown = list(last.items())[:MOST_SERIES]
        series = [
            Series(name=label, values=losses_by_task, errors={}) for label, losses_by_task in shown
        ]
        return series, f" (the first {MOST_SERIES} runs, all are in the numbers)"
    series = []
    for name, members in groups.items():
        tasks = list(dict.fromkeys(task for losses_by_task in members for task in losses_by_task))
        values = {
            task: [losses_by_task[task] for losses_by_task in members if task in losses_by_task]
            for task in tasks
        }
        means = {task: statistics.fmean(losses) for task, losses in values.items()}
        spread = {
            task: statistics.stdev(losses) for task, losses in values.items() if len(losses) > 1
        }
        series.append(Series(name=name, values=means, errors=spread))
    return series, " (means and standard deviations over the runs of a method)"
