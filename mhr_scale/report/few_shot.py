"""The section of few-shot runs: the table of variants, scores by task, score against cost."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mhr_scale.errors import counted, some
from mhr_scale.report.drawing import MOST_SERIES, count
from mhr_scale.report.page import Block, Cell, Heading, Picture, Prose, Section, Table
from mhr_scale.report.partitions import OfPartition, partition_of, partitions_table
from mhr_scale.report.pictures import Series, Spot, pictured, trade_off
from mhr_scale.report.runs import Run, part
from mhr_scale.report.scored_adapters import split_seeds
from mhr_scale.scores.comparison import compare, has_gain, legend, marked

#: Names of runs in a heading at most.
MOST_LABELS = 4
#: Settings that runs in one table have to share: all but sources and variants.
SHARED = ("tasks", "shots", "protocol", "optim", "selection", "scoring")


def few_shot(runs: Sequence[Run]) -> Section | None:
    """The tables of few-shot runs; runs with the same tasks and settings share one table."""
    with_results = [run for run in runs if run.kind == "few-shot" and run.results]
    if not with_results:
        return None
    blocks: list[Block] = []
    groups = group_runs(with_results)
    parted = [
        OfPartition(name, compare(together(group), gain_over=gain_over(group)))
        for group in groups
        for name in [partition_of(group[0])]
        if name is not None
    ]
    if parted:
        blocks.append(partitions_table(parted))
    for group in groups:
        if len(groups) > 1 or len(group) > 1:
            labels = some([run.label for run in group], shown=MOST_LABELS)
            blocks.append(Heading(text=labels + (" together" if len(group) > 1 else "")))
        blocks += of_results(together(group), gain_over=gain_over(group))
        if share_variants(group):
            for run in group:
                caption = f"{run.label} alone"
                alone = compare(together([run]), gain_over=gain_over([run]))
                blocks.append(variants_table(alone, caption, folded=True))
    return Section(id="few-shot", title="Few-shot adaptation", blocks=blocks)


def group_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs on the same tasks whose settings differ in variants and seeds only.

    An unfinished run may lack tasks of the others.
    """
    groups: list[tuple[Any, set[str], list[Run]]] = []
    for run in runs:
        settings, _ = split_seeds({name: run.config.get(name) for name in SHARED})
        tasks = {result["task"] for result in run.results}
        for others, known, group in groups:
            if settings == others and (tasks <= known or known <= tasks):
                known |= tasks
                group.append(run)
                break
        else:
            groups.append((settings, tasks, [run]))
    return [group for _, _, group in groups]


def together(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The results of some runs.

    Variants with the same jobs in two runs, or in two precisions, get the run's name in theirs.
    """
    told = {run.label: facts_of(run) for run in runs}
    jobs = Counter((r["variant"], r["seed"], r["task"]) for run in runs for r in run.results)
    twice = {variant for (variant, _, _), times in jobs.items() if times > 1}
    ways = {
        (r["variant"], {**told[run.label], **r}["precision"]) for run in runs for r in run.results
    }
    twice |= {variant for variant, times in Counter(v for v, _ in ways).items() if times > 1}
    return [
        {
            **told[run.label],
            **r,
            "variant": f"{r['variant']} ({run.label})" if r["variant"] in twice else r["variant"],
        }
        for run in runs
        for r in in_order(run)
    ]


def gain_over(runs: Sequence[Run]) -> str | None:
    """The variant that gains are measured against, if the runs name one."""
    named = {run.config.get("gain_over") for run in runs} - {None}
    return named.pop() if len(named) == 1 else None


def in_order(run: Run) -> list[dict[str, Any]]:
    """The results of a run, variants in the order of its recipe."""
    names = list(part(run.config, "variants"))
    places = {name: place for place, name in enumerate(names)}
    return sorted(run.results, key=lambda result: places.get(result["variant"], len(places)))


def facts_of(run: Run) -> dict[str, str]:
    """What a run says of all its jobs, for results that do not say it themselves."""
    selected_on = str(part(run.config, "selection").get("on"))
    return {"selected_on": selected_on, "precision": run.precision}


def share_variants(runs: Sequence[Run]) -> bool:
    """Whether some variant has results in two of the runs."""
    names = Counter(name for run in runs for name in {r["variant"] for r in run.results})
    return any(times > 1 for times in names.values())


def of_results(results: Sequence[Mapping[str, Any]], *, gain_over: str | None) -> list[Block]:
    """The table, the picture of costs and the scores by task of some jobs."""
    compared = compare(results, gain_over=gain_over)
    metrics = sorted(
        {metric for values in compared["variants"].values() for metric in values["metrics"]}
    )
    tasks = counted(len(compared["tasks"]), "task")
    caption = f"Few-shot {', '.join(metrics)} on {tasks}, in points"
    blocks: list[Block] = [variants_table(compared, caption)]
    open_seeds = [name for name, v in compared["variants"].items() if v["incomplete_seeds"]]
    if open_seeds:
        text = f"Seeds without all tasks are left out of the means of: {', '.join(open_seeds)}."
        blocks.append(Prose(text=text, is_warning=True))
    blocks += cost(compared["variants"])
    blocks += of_tasks(results, compared)
    return blocks


def variants_table(compared: Mapping[str, Any], caption: str, *, folded: bool = False) -> Table:
    """One row for each variant, as in the paper's tables."""
    rows: list[list[Cell]] = []
    gains = any(map(has_gain, compared["variants"].values()))
    for name, values in compared["variants"].items():
        seeds = values["seeds"]
        rows.append(
            [
                marked(name, values),
                values["multi_task_numbers"] or None,
                values["adaptation_numbers"],
                values.get("mean"),
                values["std_over_seeds"] if len(seeds) > 1 else None,
                values.get("mean_of_medians"),
                len(seeds),
                *([values.get("relative_gain")] if gains else []),
            ]
        )
    columns = ["method", "multi-task parameters", "adaptation parameters", "mean"]
    columns += ["std over seeds", "mean of medians", "seeds", *(["gain"] if gains else [])]
    note = (
        "Mean over tasks, then mean and standard deviation (n - 1) over seeds; mean of medians: "
        "median over seeds per task, then mean over tasks."
    )
    note = ". ".join([note.rstrip("."), *legend(compared["variants"])]) + "."
    return Table(
        caption=caption, columns=columns, rows=rows, decimals=2, note=note, is_folded=folded
    )


def cost(variants: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Accuracy against the number of parameters that a new task trains."""
    spots = [
        Spot(
            name=name,
            cost=values["adaptation_numbers"],
            score=values["mean"],
            error=values["std_over_seeds"],
        )
        for name, values in variants.items()
        if "mean" in values and values["adaptation_numbers"] > 0
    ]
    if len(spots) < 2:
        return []
    svg = trade_off(
        spots,
        title="Score against adaptation parameters",
        x="parameters trained on a new task (log scale)",
        y="mean over tasks (points)",
    )
    rows: list[list[Cell]] = [
        [spot.name, int(spot.cost), count(spot.cost), spot.score, spot.error] for spot in spots
    ]
    data = Table(
        caption="Score against adaptation parameters",
        columns=["method", "adaptation parameters", "short", "mean", "std over seeds"],
        rows=rows,
        decimals=2,
    )
    caption = (
        "Score against parameters trained on a new task. Filled: no other method scores as much "
        "with fewer (the Pareto front, the stepped line). Bars: standard deviation over seeds."
    )
    return [Picture(caption=caption, svg=svg, data=data)]


def of_tasks(results: Sequence[Mapping[str, Any]], compared: Mapping[str, Any]) -> list[Block]:
    """Mean over seeds of every task and variant, with its standard deviation."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in results:
        scores[result["variant"], result["task"]].append(result["score"])
    variants, tasks = list(compared["variants"]), compared["tasks"]
    series = [
        Series(
            name=variant,
            values={t: statistics.fmean(scores[variant, t]) for t in tasks if scores[variant, t]},
            errors={
                t: statistics.stdev(scores[variant, t])
                for t in tasks
                if len(scores[variant, t]) > 1
            },
        )
        for variant in variants
    ]
    columns = ["task", *(part for name in variants for part in (name, "std"))]
    rows: list[list[Cell]] = [
        [t, *(part for s in series for part in (s.values.get(t), s.errors.get(t)))] for t in tasks
    ]
    data = Table(caption="Scores by task", columns=columns, rows=rows, decimals=2)
    shown = series[:MOST_SERIES]
    caption = "Scores by task: means and standard deviations over seeds."
    if len(series) > len(shown):
        caption += f" The first {MOST_SERIES} variants; all are in the numbers."
    title = "Few-shot scores by task"
    return [pictured(shown, tasks, data, title=title, caption=caption, x="score (points)")]
