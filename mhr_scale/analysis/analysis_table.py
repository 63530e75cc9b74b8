"""An analysis as text: overall figures, and a table by block."""

from collections.abc import Mapping, Sequence
from typing import Any

from mhr_scale.run.tables import prose, render

COLUMNS = ("alignment", "sparsity", "discreteness", "entropy", "norm", "overlap")
#: Longer lists are printed up to this many numbers.
MOST_NUMBERS = 16


def table(analysis: Mapping[str, Any], blocks: Mapping[str, str]) -> str:
    """The figures of an `analysis.json` as text; `blocks` names the block of every linear."""
    lines = [
        f"{analysis['method']} of {analysis['n_tasks']} task(s): {analysis['n_skills']} skill(s), "
        f"{analysis['n_splits']} split(s), rank {analysis['rank']}, policy {analysis['policy']}, "
        f"{analysis['n_groups']} routing groups"
    ]
    numbers = analysis["parameters"]
    ways = ", ".join(
        f"{name} {count:,}" for name, count in numbers["variants"].items() if count is not None
    )
    lines.append(f"  numbers       {numbers['multi_task']:,} multi-task; trained per task: {ways}")
    routing, inventory, alignment = (
        analysis["routing"],
        analysis["inventory"],
        analysis["alignment"],
    )
    if routing is not None:
        lines.append(
            f"  routing       sparsity {routing['sparsity']:.3f}, discreteness "
            f"{routing['discreteness']:.3f}, entropy {routing['entropy']:.3f}, "
            f"{routing['effective_skills']:.2f} of {analysis['n_skills']} skills in effect"
        )
        lines.append(f"  usage         {_numbers(routing['usage'])}")
    lines.append(f"  update norms  {_numbers(inventory['norms'])} (mean over linears)")
    if alignment is not None:
        lines.append(
            f"  alignment     {alignment['mean']:.4f} over {len(alignment['tasks'])} tasks of "
            f"{alignment['rows']} rows"
        )
    for number, names in analysis.get("clusters", {}).items():
        lines.append(f"  cluster {number:<5} {', '.join(names)}")
    words = prose("".join(f"{line}\n" for line in lines))
    return f"{words}\n{_by_block(routing, inventory, alignment, blocks)}"


def _numbers(values: Sequence[float]) -> str:
    rest = len(values) - MOST_NUMBERS
    text = " ".join(f"{value:.3f}" for value in values[:MOST_NUMBERS])
    return text + (f" and {rest} more" if rest > 0 else "")


def _by_block(routing: Any, inventory: Any, alignment: Any, blocks: Mapping[str, str]) -> str:
    """One line per block; empty cells where a figure belongs to larger groups than blocks."""
    rows: dict[str, dict[str, list[float | None]]] = {}
    for linear in inventory["linears"]:
        row = rows.setdefault(blocks[linear["name"]], {})
        row.setdefault("norm", []).extend(linear["norms"])
        row.setdefault("overlap", []).append(linear["overlap"])
    for group in routing["groups"] if routing is not None else ():
        for key in ("sparsity", "discreteness", "entropy"):
            block = blocks.get(group["name"], group["name"].split(".layer.")[0])
            rows.get(block, {}).setdefault(key, []).append(group[key])
    for layer in alignment["layers"] if alignment is not None else ():
        rows[layer["name"]]["alignment"] = [layer["mean"]]
    columns = [column for column in COLUMNS if any(_mean(row.get(column)) for row in rows.values())]
    lines = [[name, *(_mean(row.get(column)) for column in columns)] for name, row in rows.items()]
    return render(["block", *columns], lines)


def _mean(values: Sequence[float | None] | None) -> str:
    known = [value for value in values or () if value is not None]
    return f"{sum(known) / len(known):.4f}" if known else ""
