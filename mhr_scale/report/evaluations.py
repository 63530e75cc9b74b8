"""Sections of evaluations: scores by task and prompt, over seeds, and against extra steps."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mhr_scale.errors import counted
from mhr_scale.report.drawing import MOST_SERIES, short
from mhr_scale.report.page import LONGEST, Block, Cell, Heading, Picture, Section, Table
from mhr_scale.report.pictures import Curve, Series, curves, pictured
from mhr_scale.report.runs import Run
from mhr_scale.report.scored_adapters import ScoredAdapter, scored_adapter, told_apart
from mhr_scale.scores.summary import aggregate, mean_chance


def scored(runs: Sequence[Run]) -> list[Run]:
    """The evaluations that have scores."""
    return [run for run in runs if run.kind == "evaluation" and run.summary]


def evaluations(runs: Sequence[Run]) -> Section | None:
    """Means, tasks and prompts of every evaluation."""
    evaluated = scored(runs)
    if not evaluated:
        return None
    adapters = {run.label: scored_adapter(run, runs) for run in evaluated}
    names = told_apart(list(adapters.values()))
    rows: list[list[Cell]] = [
        [
            run.label,
            names[adapters[run.label].key],
            adapters[run.label].extra_steps,
            len(run.summary["tasks"]),
            run.summary["examples"],
            run.summary["mean_over_tasks"],
            run.summary["mean_over_examples"],
        ]
        for run in evaluated
    ]
    head = ["evaluation", "of", "extra steps", "tasks", "examples", "mean over tasks"]
    head += ["mean over examples"]
    chances = [mean_chance(run.summary) for run in evaluated]
    if any(chance is not None for chance in chances):
        head.append("chance")
        rows = [[*row, chance] for row, chance in zip(rows, chances, strict=True)]
    note = ""
    if len({run.precision for run in evaluated if run.precision}) > 1:
        head.append("precision")
        rows = [[*row, run.precision] for row, run in zip(rows, evaluated, strict=True)]
        note = "Precision differs between these evaluations, and scores with it."
    caption = "Evaluations, in points from 0 to 100"
    is_long = len(rows) > LONGEST
    each = Table(caption=caption, columns=head, rows=rows, decimals=2, note=note, is_folded=is_long)
    blocks = together(evaluated, adapters, names)
    blocks.insert(len(blocks) if is_long else 0, each)
    sets: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in evaluated:
        sets[tuple(run.summary["tasks"])].append(run)
    for same_tasks in sets.values():
        blocks += of_tasks(same_tasks)
    blocks += of_prompts(evaluated)
    return Section(id="evaluations", title="Evaluations", blocks=blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """Evaluations of one adapter at one number of extra steps that differ in their seed only."""

    adapter: ScoredAdapter
    members: list[Run]

    @property
    def means(self) -> list[float]:
        """The mean over tasks under each seed."""
        return [run.summary["mean_over_tasks"] for run in self.members]


def together(
    evaluated: Sequence[Run], adapters: Mapping[str, ScoredAdapter], names: Mapping[str, str]
) -> list[Block]:
    """One row for all evaluations that differ in their seed only."""
    rows: list[list[Cell]] = []
    for seeds in grouped(evaluated, adapters):
        if len(seeds.members) > 1:
            aggregates = aggregate([run.summary for run in seeds.members])
            mean, deviation = aggregates["mean_then_std"]
            name, steps = names[seeds.adapter.key], seeds.adapter.extra_steps
            count, medians = len(seeds.members), aggregates["median_then_mean"]
            rows.append([name, steps, count, mean, deviation, medians])
    if not rows:
        return []
    columns = ["of", "extra steps", "seeds", "mean", "std over seeds", "mean of medians"]
    note = (
        "Mean over tasks, then mean and standard deviation (n - 1) over seeds; last column: median "
        "over seeds per task, then mean over tasks."
    )
    caption = "Seeds together, in points"
    return [Table(caption=caption, columns=columns, rows=rows, decimals=2, note=note)]


def grouped(evaluated: Sequence[Run], adapters: Mapping[str, ScoredAdapter]) -> list[Seeds]:
    """Finished evaluations of equal settings and the same tasks; each seed counts once."""
    groups: dict[str, Seeds] = {}
    for run in evaluated:
        if run.is_finished:
            adapter = adapters[run.label]
            same = [adapter.key, adapter.everything, list(run.summary["tasks"])]
            key = json.dumps(same, sort_keys=True, default=str)
            group = groups.setdefault(key, Seeds(adapter=adapter, members=[]))
            known = [adapters[member.label].seeds for member in group.members]
            if adapter.seeds not in known:
                group.members.append(run)
    return list(groups.values())


def of_tasks(runs: Sequence[Run]) -> list[Block]:
    """Scores by task, for evaluations of the same tasks."""
    names = list(runs[0].summary["tasks"])
    columns = ["task", "metric", "examples"]
    columns += [part for run in runs for part in (run.label, "+-")]
    rows: list[list[Cell]] = []
    for name in names:
        tasks = [run.summary["tasks"][name] for run in runs]
        row: list[Cell] = [name, tasks[0]["metric"], tasks[0]["examples"]]
        for run, task in zip(runs, tasks, strict=True):
            row += [task["mean"], run.errors.get(name)]
        rows.append(row)
    note = "+-: standard error of the mean over the task's examples."
    data = Table(caption="Scores by task", columns=columns, rows=rows, decimals=2, note=note)
    if len(runs) > MOST_SERIES:
        caption = f"Scores by task of {counted(len(runs), 'evaluation')}, in points"
        return [replace(data, caption=caption, is_folded=True)]
    series = [
        Series(
            name=run.label,
            values={name: run.summary["tasks"][name]["mean"] for name in names},
            errors=run.errors,
        )
        for run in runs
    ]
    caption = (
        f"Scores on {counted(len(names), 'task')}; the lines are standard errors over examples."
    )
    title = "Scores by task"
    return [pictured(series, names, data, title=title, caption=caption, x="score (points)")]


def of_prompts(runs: Sequence[Run]) -> list[Block]:
    """Spread over prompts, for tasks that have several."""
    blocks: list[Block] = []
    for run in runs:
        tasks = {n: task for n, task in run.summary["tasks"].items() if "prompts" in task}
        if not tasks:
            continue
        rows: list[list[Cell]] = [
            [
                name,
                len(task["prompts"]),
                task["prompt_mean"],
                task["prompt_median"],
                min(task["prompts"].values()),
                max(task["prompts"].values()),
                task["prompt_spread"],
            ]
            for name, task in tasks.items()
        ]
        columns = ["task", "prompts", "mean", "median", "lowest", "highest", "spread"]
        caption = f"Prompts of {run.label}, in points"
        blocks.append(Table(caption=caption, columns=columns, rows=rows, decimals=2))
        each: list[list[Cell]] = [
            [name, prompt, mean]
            for name, task in tasks.items()
            for prompt, mean in task["prompts"].items()
        ]
        caption = f"Every prompt of {run.label}"
        columns = ["task", "prompt", "score"]
        blocks.append(
            Table(caption=caption, columns=columns, rows=each, decimals=2, is_folded=True)
        )
    return [Heading(text="Prompts"), *blocks] if blocks else []


# -- extra steps -----------------------------------------------------------------------------------


def extra_steps(runs: Sequence[Run]) -> Section | None:
    """Zero-shot score of averaged adapters against extra steps, aggregated over seeds."""
    evaluated = scored(runs)
    adapters = {run.label: scored_adapter(run, runs) for run in evaluated}
    names = told_apart(list(adapters.values()))
    found = series_of(grouped(evaluated, adapters), names)
    if not found:
        return None
    rows: list[list[Cell]] = []
    lines = []
    for number, (name, points) in enumerate(found):
        means = [statistics.fmean(seeds.means) for seeds in points]
        spread = [statistics.stdev(p.means) if len(p.means) > 1 else 0.0 for p in points]
        for seeds, mean, deviation in zip(points, means, spread, strict=True):
            count, steps = len(seeds.means), seeds.adapter.extra_steps
            rows.append([name, steps, count, mean, deviation if count > 1 else None])
        lines.append(
            Curve(
                name=short(name),
                x=[seeds.adapter.extra_steps or 0 for seeds in points],
                y=means,
                errors=spread if any(spread) else (),
                look=number,
                is_marked=True,
            )
        )
    columns = ["of", "extra steps", "seeds", "mean over tasks", "std over seeds"]
    data = Table(caption="Score against extra steps", columns=columns, rows=rows, decimals=2)
    title = "Zero-shot score against extra steps"
    if all(len(line.x) == 1 for line in lines):
        block: Block = replace(data, caption=f"{title}, in points")
    else:
        svg = curves(lines, title=title, x="extra steps", y="mean over tasks (points)")
        caption = f"{title} on the training mixture."
        if any(line.errors for line in lines):
            caption += " The lines are standard deviations over seeds."
        block = Picture(caption=caption, svg=svg, data=data)
    return Section(id="extra-steps", title="Zero-shot against extra steps", blocks=[block])


def series_of(groups: Sequence[Seeds], names: Mapping[str, str]) -> list[tuple[str, list[Seeds]]]:
    """The points of each curve, by extra steps.

    Averages of one adapter are one curve, whatever their folders; under other schedules, or asked
    other tasks, they are only where no number of steps stands twice.
    """
    by_key: dict[str, list[Seeds]] = defaultdict(list)
    for group in groups:
        if group.adapter.extra_steps is not None:
            by_key[group.adapter.key].append(group)
    found = []
    for key, points in by_key.items():
        parts: dict[str, list[Seeds]] = {names[key]: points}
        if len({point.adapter.extra_steps for point in points}) < len(points):
            parts = defaultdict(list)
            for point in points:
                tasks = len(point.members[0].summary["tasks"])
                way = point.adapter.schedule.get("average.schedule_steps")
                schedule = "" if way is None else f", schedule of {way:,} steps"
                parts[f"{names[key]}, {counted(tasks, 'task')}{schedule}"].append(point)
        found += [
            (name, sorted(part, key=lambda point: point.adapter.extra_steps or 0))
            for name, part in parts.items()
        ]
    return found
