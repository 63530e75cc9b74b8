"""Few-shot runs on partitions of a benchmark (CrossFit) in one table, a row for each of them."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from mhr_scale.report.page import Cell, Table
from mhr_scale.report.runs import Run, part
from mhr_scale.scores.comparison import has_gain, legend, marked


class OfPartition(NamedTuple):
    """What was compared on the tasks of one partition."""

    name: str
    compared: Mapping[str, Any]


def partition_of(run: Run) -> str | None:
    """The partition whose tasks a run has adapted to; None for other suites."""
    name = part(run.config, "tasks").get("partition")
    return None if name is None else PurePath(str(name)).stem


def partitions_table(partitions: Sequence[OfPartition]) -> Table:
    """Mean over tasks, and average relative gain, of every variant on every partition."""
    found = [one.compared["variants"] for one in partitions]
    every = dict.fromkeys(marked(n, v) for variants in found for n, v in variants.items())
    gains = {marked(n, v) for variants in found for n, v in variants.items() if has_gain(v)}
    columns = ["partition", "tasks"]
    for name in every:
        columns += [name, *([f"{name}: gain"] if name in gains else [])]
    rows: list[list[Cell]] = []
    for one, variants in zip(partitions, found, strict=True):
        named = {marked(name, values): values for name, values in variants.items()}
        row: list[Cell] = [one.name, len(one.compared["tasks"])]
        for name in every:
            values = named.get(name, {})
            row += [values.get("mean"), *([values.get("relative_gain")] if name in gains else [])]
        rows.append(row)
    note = "Mean over tasks, then over seeds, in points."
    lines = sorted({line for variants in found for line in legend(variants)})
    note = ". ".join([note.rstrip("."), *lines]) + "."
    return Table(caption="By partition", columns=columns, rows=rows, decimals=2, note=note)
