"""What an evaluation has scored: which method, after how many extra steps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhr_scale.errors import RunError
from mhr_scale.report.runs import Run, extra_steps, method_of, part, read_tree

#: Settings in which runs of one method may differ: seeds, paths and the `run` part.
OF_SEEDS = ("run", "averaged_adapter", "seed", "seeds")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAdapter:
    """What was scored; adapters of one `key` differ in their seed or extra steps only."""

    name: str
    key: str
    extra_steps: int | None
    """None: not an averaged adapter."""


def scored_adapter(run: Run, runs: Sequence[Run]) -> ScoredAdapter:
    """The adapter an evaluation scored; its source is read where it still exists."""
    config = run.config
    questions = {"tasks": seedless(config.get("tasks")), "scoring": config.get("scoring")}
    adapter = config.get("adapter")
    if not isinstance(adapter, str):
        bare = part(config, "backbone")
        name = f"{bare.get('name') or 'random weights'} alone"
        return ScoredAdapter(name=name, key=_key(name, bare, questions), extra_steps=None)
    folder, steps = Path(adapter), None
    if folder.parent.name == "averaged" and folder.name.isdigit():
        folder, steps = folder.parent.parent, int(folder.name)
    average = recipe_of(folder, "average.yaml", runs)
    if average:
        steps = extra_steps(average)[-1] if steps is None else steps
        folder = Path(str(average.get("source")))
    trained = recipe_of(folder, "config.yaml", runs)
    routing = str(config.get("routing", "own"))
    is_mean = steps is not None or routing == "average"
    if "schedule" not in trained:
        return ScoredAdapter(name=adapter, key=_key(adapter, routing, questions), extra_steps=steps)
    name = method_of(trained)
    name += "-mu" if is_mean and name != "LoRA" else ""
    name += " (soup)" if routing == "soup" else ""
    way = {key: value for key, value in average.items() if key in ("trainable", "warmup_fraction")}
    return ScoredAdapter(
        name=name, key=_key(name, seedless(trained), way, routing, questions), extra_steps=steps
    )


def recipe_of(folder: Path, name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A recipe file of a folder, or of a given run that was written there; else empty."""
    places = [folder]
    for run in runs:
        recipe = run.average if name == "average.yaml" else run.config
        written = part(recipe, "run").get("folder")
        places += [run.folder] if written and Path(str(written)) == folder else []
    for place in places:
        try:
            if recipe := read_tree(place / name):
                return recipe
        except RunError:  # the report can do without it
            continue
    return {}


def seedless(tree: Any) -> Any:
    """Settings without those that differ between seeds (`OF_SEEDS`)."""
    if not isinstance(tree, Mapping):
        return tree
    return {
        key: seedless(value)
        for key, value in tree.items()
        if key not in OF_SEEDS and not key.endswith("_seed")
    }


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)


def told_apart(adapters: Sequence[ScoredAdapter]) -> dict[str, str]:
    """A name for every key, numbered if different settings share a name."""
    names: dict[str, str] = {}
    for adapter in adapters:
        if adapter.key not in names:
            same = sum(
                name == adapter.name or name.startswith(f"{adapter.name} [")
                for name in names.values()
            )
            names[adapter.key] = f"{adapter.name} [{same + 1}]" if same else adapter.name
    return names
