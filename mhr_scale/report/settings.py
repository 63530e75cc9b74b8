"""Sections of settings (differences first) and of provenance."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mhr_scale.errors import counted
from mhr_scale.recipe import strict_yaml
from mhr_scale.recipe.settings import as_written
from mhr_scale.report.page import Block, Cell, Listing, Prose, Section, Table
from mhr_scale.report.runs import Run, part
from mhr_scale.run.run_folder import dotted

#: Runs that get a column each; more get a row each.
MOST_COLUMNS = 12


def settings(runs: Sequence[Run]) -> Section | None:
    """The settings in which runs of one kind differ, and every full recipe, folded."""
    blocks: list[Block] = []
    for kind in dict.fromkeys(run.kind for run in runs):
        same_kind = [run for run in runs if run.kind == kind and run.config]
        if len(same_kind) > 1:
            blocks.append(differences(same_kind))
    for run in runs:
        for name, tree in (("average.yaml", run.average), ("config.yaml", run.config)):
            if tree:
                text = strict_yaml.write(only_set(tree))
                blocks.append(Listing(title=f"{run.label}: {name}", text=text))
    return Section(id="settings", title="Settings", blocks=blocks) if blocks else None


def only_set(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the settings that are null, and without parts that are empty then."""
    found = {
        key: only_set(value) if isinstance(value, Mapping) else value for key, value in tree.items()
    }
    return {key: value for key, value in found.items() if value not in (None, {})}


def differences(runs: Sequence[Run]) -> Table:
    """A table of the settings in which runs of one kind differ."""
    flat = [
        dotted({**{f"average.{key}": value for key, value in run.average.items()}, **run.config})
        for run in runs
    ]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    differing = [key for key in keys if len({_say(values, key) for values in flat}) > 1]
    caption = f"Settings in which the {len(runs)} runs of kind {runs[0].kind} differ"
    n_same = len(keys) - len(differing)
    note = f"The other {counted(n_same, 'setting')} {'is' if n_same == 1 else 'are'} the same."
    if len(runs) <= MOST_COLUMNS:
        rows: list[list[Cell]] = [
            [key, *(_say(values, key) for values in flat)] for key in differing
        ]
        columns = ["setting", *(run.label for run in runs)]
    else:
        rows = [
            [run.label, *(_say(values, key) for key in differing)]
            for run, values in zip(runs, flat, strict=True)
        ]
        columns = ["run", *differing]
    return Table(caption=caption, columns=columns, rows=rows, note=note)


def _say(values: Mapping[str, Any], key: str) -> str | None:
    """A setting as a recipe spells it; None where it is not set."""
    value = values.get(key)
    return None if value is None else as_written(value)


def short_commit(text: str) -> str:
    """A commit in ten letters, with what `git describe` says behind it."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", text)


def provenance(runs: Sequence[Run]) -> Section | None:
    """Command, code, versions and machine of every start."""
    rows: list[list[Cell]] = []
    versions: dict[str, dict[str, str]] = {}
    for run in runs:
        for number, start in enumerate(run.starts, 1):
            label = run.label if len(run.starts) == 1 else f"{run.label}, start {number}"
            argv = start.get("argv")
            words = [str(word) for word in argv] if isinstance(argv, list) else []
            place = [str(start.get(key)) for key in ("device", "placement") if start.get(key)]
            rows.append(
                [
                    label,
                    _text(start.get("started")).replace("T", " "),
                    shlex.join(words),
                    short_commit(_text(start.get("git_commit"))),
                    _text(start.get("host")),
                    start.get("world_size") if isinstance(start.get("world_size"), int) else None,
                    ", ".join(place),
                ]
            )
            versions[label] = {
                "python": _text(start.get("python")),
                "platform": _text(start.get("platform")),
                **{key: str(value) for key, value in part(start, "versions").items()},
            }
    if not rows:
        return None
    columns = ["run", "started", "command", "commit", "machine", "ranks", "where"]
    blocks: list[Block] = [Table(caption="Every start of every run", columns=columns, rows=rows)]
    blocks += versions_of(versions)
    silent = [run.label for run in runs if not run.starts]
    if silent:
        blocks.append(Prose(text=f"Without provenance.json: {', '.join(silent)}."))
    return Section(id="provenance", title="Provenance", blocks=blocks)


def versions_of(versions_by_start: Mapping[str, Mapping[str, str]]) -> list[Block]:
    """Package versions, with one column for each distinct set of them."""
    sets: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for label, versions in versions_by_start.items():
        sets.setdefault(tuple(versions.items()), []).append(label)
    names = list(dict.fromkeys(name for versions in sets for name, _ in versions))
    heads = ["version"] if len(sets) == 1 else [_who(labels) for labels in sets.values()]
    rows = [[name, *(dict(v).get(name, "absent") for v in sets)] for name in names]
    return [Table(caption="Versions", columns=["package", *heads], rows=rows, is_folded=True)]


def _who(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
