"""Sections of analyses: gradient alignment, routing, inventory, parameter counts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mhr_scale.analysis import ANALYSIS
from mhr_scale.errors import RunError, counted
from mhr_scale.families.table import shorten
from mhr_scale.report.page import Block, Cell, Heading, Picture, Section, Table
from mhr_scale.report.pictures import (
    MOST_CELL_NAMES,
    MOST_NAMES,
    Scale,
    Series,
    heat_map,
    pictured,
)
from mhr_scale.report.runs import Run

SKILL = "skill {}"
#: Statistics of routing between 0 and 1, per group and overall.
STATISTICS = ("sparsity", "discreteness", "entropy")


def analysed(runs: Sequence[Run]) -> list[Section]:
    """Alignment, routing and inventory of all analyses; sections without content are left out."""
    analyses = [run for run in runs if run.analysis]
    if not analyses:
        return []
    parts = (
        ("alignment", "Gradient alignment", alignment),
        ("routing", "Routing", routing),
        ("inventory", "Inventory of skills", inventory),
    )
    sections = []
    for name, title, make in parts:
        with_part = [run for run in analyses if run.analysis.get(name)]
        figures: list[dict[str, Cell]] = []
        blocks: list[Block] = []
        for run in with_part:
            if len(with_part) > 1:
                blocks.append(Heading(text=f"{run.label} ({run.analysis.get('method')})"))
            try:
                figures.append(single_figures(run.analysis[name], name))
                blocks += make(run.analysis)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise RunError(
                    f"{run.folder / ANALYSIS}: no {name} that a report can show "
                    f"({error!r}); analyse again"
                ) from error
        if len(with_part) > 1:
            blocks.insert(0, side_by_side(with_part, figures, caption=f"{name.title()} in figures"))
        if blocks:
            sections.append(Section(id=name, title=title, blocks=blocks))
    counted = [run for run in analyses if run.analysis.get("parameters")]
    if counted:
        sections.append(parameters(counted))
    return sections


def side_by_side(
    runs: Sequence[Run], figures: Sequence[Mapping[str, Cell]], *, caption: str
) -> Table:
    """The summary figures of several analyses, one row each."""
    rows: list[list[Cell]] = [
        [run.label, str(run.analysis.get("method")), *values.values()]
        for run, values in zip(runs, figures, strict=True)
    ]
    return Table(caption=caption, columns=["run", "method", *figures[0]], rows=rows)


def single_figures(part: Mapping[str, Any], name: str) -> dict[str, Cell]:
    """The figures that summarise a part of an analysis, by their names in tables."""
    if name == "inventory":
        return {"mean overlap of skills": mean_overlap(part)}
    keys = ("mean", "rows") if name == "alignment" else (*STATISTICS, "effective_skills")
    return {key.replace("_", " "): part.get(key) for key in keys}


def alignment(analysis: Mapping[str, Any]) -> list[Block]:
    """The matrix of cosines and their mean per layer."""
    part = analysis["alignment"]
    blocks: list[Block] = []
    caption = (
        f"Cosine of the gradients of {counted(len(part['tasks']), 'task')} with respect to the "
        f"shared inventory, {counted(part['rows'], 'row')} each, similar tasks side by side. Mean "
        f"over pairs: {part['mean']:.3f}."
    )
    blocks.append(task_cosines(part["tasks"], part, title="Gradient alignment", caption=caption))
    layers = part.get("layers") or []
    if layers:
        values = {layer["name"]: layer["mean"] for layer in layers}
        rows: list[list[Cell]] = [[name, value] for name, value in values.items()]
        series = [Series(name="alignment", values=values, errors={})]
        data = Table(caption="Alignment by layer", columns=["layer", "mean cosine"], rows=rows)
        blocks.append(
            pictured(
                series,
                list(values),
                data,
                title="Gradient alignment by layer",
                caption="Gradient alignment by layer.",
                x="mean cosine over pairs of tasks",
            )
        )
    return blocks


def routing(analysis: Mapping[str, Any]) -> list[Block]:
    """How tasks use skills: statistics and usage per group, and similarity of tasks."""
    part = analysis["routing"]
    groups = part["groups"]
    skills = [str(number) for number in range(len(part["usage"]))]
    figures = list(single_figures(part, "routing").items())
    blocks: list[Block] = [
        Table(caption="Routing over all routing groups", columns=["figure", "value"], rows=figures)
    ]
    names = [group["name"] for group in groups]
    short_names = shorten(names)
    usage = [group["usage"] for group in groups]
    svg = heat_map(
        usage,
        short_names,
        skills,
        title="Usage of skills by routing group",
        x="skill",
        y="routing group",
        scale=around_even(usage),
    )
    even = f"White is an even share, {1 / max(1, len(skills)):.3g}."
    data = matrix_table("Usage", "routing group", names, [SKILL.format(s) for s in skills], usage)
    caption = f"Share of the mixing weight that each skill gets in every routing group. {even}"
    blocks.append(Picture(caption=caption, svg=svg, data=data))
    series = [
        Series(
            name=key,
            values={name: group[key] for name, group in zip(short_names, groups, strict=True)},
            errors={},
        )
        for key in STATISTICS
    ]
    rows: list[list[Cell]] = [[g["name"], *(g[key] for key in STATISTICS)] for g in groups]
    data = Table(caption="Routing statistics", columns=["routing group", *STATISTICS], rows=rows)
    caption = "Sparsity, discreteness and normalised entropy of every routing group."
    blocks.append(
        pictured(
            series,
            short_names,
            data,
            title="Routing statistics by routing group",
            caption=caption,
            x="from 0 to 1",
            what="routing group",
        )
    )
    similarity = part.get("similarity")
    if similarity and len(similarity["matrix"]) > 1:
        tasks = analysis["task_names"]
        caption = (
            f"Cosine of the routing of {counted(len(tasks), 'task')}, similar tasks side by side."
        )
        title = "Similarity of routing"
        blocks.append(task_cosines(tasks, similarity, title=title, caption=caption))
    return blocks


def task_cosines(
    task_names: Sequence[str], similarity: Mapping[str, Any], *, title: str, caption: str
) -> Picture:
    """A matrix of cosines between tasks in its clustered order."""
    names = [task_names[number] for number in similarity["order"]]
    matrix = [
        [similarity["matrix"][r][c] for c in similarity["order"]] for r in similarity["order"]
    ]
    scale = symmetric(matrix)
    svg = heat_map(matrix, names, names, title=title, x="task", y="task", scale=scale)
    data = matrix_table(title, "task", names, names, matrix)
    return Picture(caption=caption, svg=svg, data=data)


def inventory(analysis: Mapping[str, Any]) -> list[Block]:
    """Sizes of the skills' updates and how much they overlap."""
    part = analysis["inventory"]
    linears = part["linears"]
    names = [linear["name"] for linear in linears]
    norms = [linear["norms"] for linear in linears]
    skills = [str(number) for number in range(len(part["norms"]))]
    heads = [SKILL.format(skill) for skill in skills]
    svg = heat_map(
        norms,
        shorten(names),
        skills,
        title="Norms of the skills' updates",
        x="skill",
        y="linear",
        scale=Scale(label="Frobenius norm", low=0.0, high=max(map(max, norms), default=1.0)),
    )
    rows: list[list[Cell]] = [
        [linear["name"], *linear["norms"], linear["overlap"]] for linear in linears
    ]
    data = Table(caption="Norms", columns=["linear", *heads, "overlap"], rows=rows)
    caption = "Frobenius norm of every skill's update, for every adapted linear."
    blocks: list[Block] = [Picture(caption=caption, svg=svg, data=data)]
    if not any(norm for row in norms for norm in row):
        blocks = [replace(data, caption=f"{caption} All are 0.", is_folded=True)]
    overlap = part["overlap"]
    if len(overlap) > 1:
        svg = heat_map(
            overlap,
            skills,
            skills,
            title="Overlap of skills",
            x="skill",
            y="skill",
            scale=Scale(label="|cosine|", low=0.0, high=1.0),
        )
        data = matrix_table("Overlap of skills", "skill", heads, heads, overlap)
        caption = (
            "Overlap of skills: absolute cosine of their updates, mean over linears; mean over "
            f"pairs {mean_overlap(part):.3f}."
        )
        if math.isnan(mean_overlap(part)):
            blocks.append(replace(data, note="Skills without an update have no overlap."))
        else:
            blocks.append(Picture(caption=caption, svg=svg, data=data))
    return blocks


def parameters(runs: Sequence[Run]) -> Section:
    """Parameters that each way to adapt trains."""
    rows: list[list[Cell]] = []
    for run in runs:
        counts = run.analysis["parameters"]
        ways = counts.get("variants") or {}
        rows.append(
            [
                run.label,
                str(run.analysis.get("method")),
                counts.get("multi_task"),
                *(ways.get(way) for way in ("full", "routing", "average")),
            ]
        )
    columns = ["run", "method", "multi-task", "full", "routing alone", "average"]
    note = "Multi-task: the shared inventory; the others: per new task."
    table = Table(caption="Trained parameters", columns=columns, rows=rows, note=note)
    return Section(id="parameters", title="Parameters", blocks=[table])


# -- matrices --------------------------------------------------------------------------------------


def symmetric(matrix: Sequence[Sequence[float]]) -> Scale:
    """Colours of cosines around 0, up to the largest absolute value off the diagonal."""
    cosines = [abs(value) for value in off_diagonal(matrix) if math.isfinite(value)]
    most = min(1.0, max([*cosines, 0.05]))
    return Scale(label="cosine", low=-most, high=most, is_signed=True)


def around_even(usage: Sequence[Sequence[float]]) -> Scale:
    """Colours of shares around the one that all skills have under uniform routing."""
    even = 1.0 / max(1, len(usage[0]))
    most = max([0.01, *(abs(share - even) for row in usage for share in row)])
    return Scale(label="share of the weight", low=even - most, high=even + most, is_signed=True)


def matrix_table(
    caption: str,
    corner: str,
    rows: Sequence[str],
    columns: Sequence[str],
    matrix: Sequence[Sequence[float]],
) -> Table:
    """A matrix as a table with named rows and columns."""
    cells: list[list[Cell]] = [[name, *row] for name, row in zip(rows, matrix, strict=True)]
    head = [corner, *columns]
    most = MOST_CELL_NAMES if rows == columns else MOST_NAMES
    if len(rows) > most:  # the picture has numbers in place of names
        cells = [[number, *row] for number, row in enumerate(cells)]
        head = ["number", *head]
    return Table(caption=caption, columns=head, rows=cells, decimals=3)


def off_diagonal(matrix: Sequence[Sequence[float | None]]) -> list[float]:
    """The values off the diagonal, without None (the overlap with an update of zero)."""
    return [
        v for r, row in enumerate(matrix) for c, v in enumerate(row) if r != c and v is not None
    ]


def mean_overlap(part: Mapping[str, Any]) -> float:
    """Mean overlap over pairs of skills; NaN if no pair has one."""
    overlaps = off_diagonal(part["overlap"])
    return math.fsum(overlaps) / len(overlaps) if overlaps else math.nan
