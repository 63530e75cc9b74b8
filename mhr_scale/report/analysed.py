"""What `analyse` found out: gradient alignment, routing and the inventory's skills."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mhr_scale.analysis import ANALYSIS
from mhr_scale.errors import RunError
from mhr_scale.families.table import shorten
from mhr_scale.report.page import Block, Cell, Heading, Picture, Section, Table
from mhr_scale.report.pictures import Scale, Series, by_name, heat_map
from mhr_scale.report.runs import Run

SKILL = "skill {}"
#: Statistics of routing from 0 to 1, of a group and over all; effective skills are a count.
STATISTICS = ("sparsity", "discreteness", "entropy")


def analysed(runs: Sequence[Run]) -> list[Section]:
    """Alignment, routing and inventory of all analyses, each where there is something to show."""
    found = [run for run in runs if run.analysis]
    if not found:
        return []
    parts = (
        ("alignment", "Gradient alignment", alignment),
        ("routing", "Routing", routing),
        ("inventory", "Inventory of skills", inventory),
    )
    sections = []
    for name, title, make in parts:
        having = [run for run in found if run.analysis.get(name)]
        figures: list[dict[str, Cell]] = []
        blocks: list[Block] = []
        for run in having:
            if len(having) > 1:
                blocks.append(Heading(text=f"{run.label} ({run.analysis.get('method')})"))
            try:
                figures.append(single_figures(run.analysis[name], name))
                blocks += make(run.analysis)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise RunError(
                    f"{run.folder / ANALYSIS}: no {name} that a report can show "
                    f"({error!r}); analyse again"
                ) from error
        if len(having) > 1:
            blocks.insert(0, side_by_side(having, figures, caption=f"{name.title()} in figures"))
        if blocks:
            sections.append(Section(id=name, title=title, blocks=blocks))
    counted = [run for run in found if run.analysis.get("parameters")]
    if counted:
        sections.append(parameters(counted))
    return sections


def side_by_side(
    runs: Sequence[Run], figures: Sequence[Mapping[str, Cell]], *, caption: str
) -> Table:
    """The single figures of several analyses."""
    rows: list[list[Cell]] = [
        [run.label, str(run.analysis.get("method")), *found.values()]
        for run, found in zip(runs, figures, strict=True)
    ]
    return Table(caption=caption, columns=["run", "method", *figures[0]], rows=rows)


def single_figures(part: Mapping[str, Any], name: str) -> dict[str, Cell]:
    """The figures of a part of an analysis that stand for all of it, by what tables call them."""
    if name == "inventory":
        return {"mean overlap of skills": mean_overlap(part)}
    keys = ("mean", "rows") if name == "alignment" else (*STATISTICS, "effective_skills")
    return {key.replace("_", " "): part.get(key) for key in keys}


def alignment(found: Mapping[str, Any]) -> list[Block]:
    """The matrix of cosines and their mean per layer."""
    part = found["alignment"]
    blocks: list[Block] = []
    caption = (
        f"Cosine of the gradients of {len(part['tasks'])} tasks with respect to the shared "
        f"inventory, {part['rows']} rows each, similar tasks side by side. Mean over pairs: "
        f"{part['mean']:.3f}."
    )
    blocks.append(task_cosines(part["tasks"], part, title="Gradient alignment", caption=caption))
    layers = part.get("layers") or []
    if layers:
        values = {layer["name"]: layer["mean"] for layer in layers}
        rows: list[list[Cell]] = [[name, value] for name, value in values.items()]
        svg = by_name(
            [Series(name="alignment", values=values, errors={})],
            list(values),
            title="Gradient alignment by layer",
            x="mean cosine over pairs of tasks",
        )
        data = Table(caption="Alignment by layer", columns=["layer", "mean cosine"], rows=rows)
        blocks.append(Picture(caption="Gradient alignment by layer.", svg=svg, data=data))
    return blocks


def routing(found: Mapping[str, Any]) -> list[Block]:
    """How tasks use skills: statistics and usage per group, and how alike tasks are."""
    part = found["routing"]
    groups = part["groups"]
    skills = [str(number) for number in range(len(part["usage"]))]
    figures = list(single_figures(part, "routing").items())
    blocks: list[Block] = [
        Table(caption="Routing over all groups", columns=["figure", "value"], rows=figures)
    ]
    names = [group["name"] for group in groups]
    brief = shorten(names)
    usage = [group["usage"] for group in groups]
    svg = heat_map(
        usage,
        brief,
        skills,
        title="Usage of skills by routing group",
        x="skill",
        y="group",
        scale=around_even(usage),
    )
    even = f"White is an even share, {1 / max(1, len(skills)):.3g}."
    data = matrix_table("Usage", "group", names, [SKILL.format(s) for s in skills], usage)
    caption = f"Share of the mixing weight that each skill gets in every routing group. {even}"
    blocks.append(Picture(caption=caption, svg=svg, data=data))
    series = [
        Series(
            name=key,
            values={name: group[key] for name, group in zip(brief, groups, strict=True)},
            errors={},
        )
        for key in STATISTICS
    ]
    svg = by_name(series, brief, title="Routing statistics by group", x="from 0 to 1")
    rows: list[list[Cell]] = [[g["name"], *(g[key] for key in STATISTICS)] for g in groups]
    data = Table(caption="Routing statistics", columns=["group", *STATISTICS], rows=rows)
    caption = "Sparsity, discreteness and normalised entropy of every routing group."
    blocks.append(Picture(caption=caption, svg=svg, data=data))
    similarity = part.get("similarity")
    if similarity and len(similarity["matrix"]) > 1:
        tasks = found["task_names"]
        caption = f"Cosine of the routing of {len(tasks)} tasks, similar tasks side by side."
        title = "Similarity of routing"
        blocks.append(task_cosines(tasks, similarity, title=title, caption=caption))
    return blocks


def task_cosines(
    task_names: Sequence[str], found: Mapping[str, Any], *, title: str, caption: str
) -> Picture:
    """A matrix of cosines between tasks in its clustered order."""
    names = [task_names[number] for number in found["order"]]
    matrix = [[found["matrix"][r][c] for c in found["order"]] for r in found["order"]]
    scale = symmetric(matrix)
    svg = heat_map(matrix, names, names, title=title, x="task", y="task", scale=scale)
    data = matrix_table(title, "task", names, names, matrix)
    return Picture(caption=caption, svg=svg, data=data)


def inventory(found: Mapping[str, Any]) -> list[Block]:
    """Sizes of the skills' updates and how much they overlap."""
    part = found["inventory"]
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
        blocks.append(Picture(caption=caption, svg=svg, data=data))
    return blocks


def parameters(runs: Sequence[Run]) -> Section:
    """What each way to adapt trains."""
    rows: list[list[Cell]] = []
    for run in runs:
        found = run.analysis["parameters"]
        ways = found.get("variants") or {}
        rows.append(
            [
                run.label,
                str(run.analysis.get("method")),
                found.get("multi_task"),
                *(ways.get(way) for way in ("full", "routing", "average")),
            ]
        )
    columns = ["run", "method", "multi-task", "full", "routing alone", "average"]
    note = "Multi-task: the shared inventory; the others: per new task."
    table = Table(caption="Trained parameters", columns=columns, rows=rows, note=note)
    return Section(id="parameters", title="Parameters", blocks=[table])


# -- matrices --------------------------------------------------------------------------------------


def symmetric(matrix: Sequence[Sequence[float]]) -> Scale:
    """Colours of cosines around 0 that reach to the largest one beside the diagonal."""
    beside = [abs(value) for value in off_diagonal(matrix) if math.isfinite(value)]
    most = min(1.0, max([*beside, 0.05]))
    return Scale(label="cosine", low=-most, high=most, is_signed=True)


def around_even(usage: Sequence[Sequence[float]]) -> Scale:
    """Colours around the share that every skill has where none is preferred."""
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
    """A matrix as a table with names."""
    cells: list[list[Cell]] = [[name, *row] for name, row in zip(rows, matrix, strict=True)]
    return Table(caption=caption, columns=[corner, *columns], rows=cells, decimals=3)


def off_diagonal(matrix: Sequence[Sequence[float | None]]) -> list[float]:
    """The values beside the diagonal; None is an overlap that updates of zero do not have."""
    return [
        v for r, row in enumerate(matrix) for c, v in enumerate(row) if r != c and v is not None
    ]


def mean_overlap(part: Mapping[str, Any]) -> float:
    """Mean overlap of two skills; NaN where no two have one."""
    beside = off_diagonal(part["overlap"])
    return math.fsum(beside) / len(beside) if beside else math.nan
