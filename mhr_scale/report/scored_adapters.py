"""What an evaluation has scored: which method, under which settings and seeds, after how many
extra steps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhr_scale.adapters import CARD
from mhr_scale.errors import RunError
from mhr_scale.recipe.settings import as_written
from mhr_scale.report.runs import Run, extra_steps, method_of, part, read_tree
from mhr_scale.run.files import read_object
from mhr_scale.run.run_folder import INPUTS, dotted
from mhr_scale.training import FREE

#: Parts and settings that say where and how fast something ran, or what is kept of it.
OF_PLACES = ("run", "monitor", "backbone_moved_to", "scoring.max_tokens", "scoring.texts")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAdapter:
    """What was scored, and how; equal `settings` differ in their seeds or extra steps only."""

    name: str
    settings: Mapping[str, Any]
    """By dotted names: `average.` and `pretrain.` are of what was scored."""
    seeds: Mapping[str, Any]
    extra_steps: int | None
    """None: not an averaged adapter."""
    schedule: Mapping[str, Any]
    """Length and warm-up of the schedule of the extra steps, where known."""

    @property
    def key(self) -> str:
        """Equal for all that differ in their seeds or extra steps only."""
        return json.dumps([self.name, self.settings], sort_keys=True, default=str)

    @property
    def everything(self) -> dict[str, Any]:
        """All settings but the seeds, by dotted names."""
        steps = {} if self.extra_steps is None else {"average.steps": self.extra_steps}
        return {**self.settings, **steps, **self.schedule}


def scored_adapter(run: Run, runs: Sequence[Run]) -> ScoredAdapter:
    """The adapter an evaluation scored; its source is read where it still exists."""
    own = {key: value for key, value in run.config.items() if key != "adapter"}
    own |= {"precision": run.precision, **_rows(run)}
    adapter, routing = run.config.get("adapter"), str(own.get("routing", "own"))
    if not isinstance(adapter, str):
        name = f"{part(own, 'backbone').get('name') or 'random weights'} alone"
        return _make(name, {"": own})
    source, steps, average = _averaged(Path(adapter), runs)
    trained = recipe_of(source, "config.yaml", runs)
    is_known = "schedule" in trained
    if routing == "off":
        of_run = {"backbone": part(trained, "backbone")} if is_known else {"adapter": str(source)}
        name = f"{part(trained, 'backbone').get('name') or f'backbone of {source}'} alone"
        return _make(name, {"": own, "pretrain.": of_run})
    if not is_known:
        return _make(adapter, {"": own, "pretrain.": {"adapter": str(source)}}, average, steps)
    name = method_of(trained)
    name += "-mu" if (steps is not None or routing == "average") and name != "LoRA" else ""
    name += f" ({routing})" if routing in ("soup", "arrow") else ""
    return _make(name, {"": own, "pretrain.": trained}, average, steps)


def _rows(run: Run) -> dict[str, Any]:
    """The rows that were scored, by their content in place of their folder, where it is known.

    Not where a seed draws them: that differs between seeds.
    """
    tasks, file = part(run.config, "tasks"), run.folder / INPUTS
    if split_seeds(tasks)[1] or not file.is_file():
        return {}
    try:
        inputs = read_object(file, RunError)
    except RunError:  # the report can do without it
        return {}
    rows = {name: told for name, told in inputs.items() if name.startswith("rows of ")}
    return {"tasks": {k: v for k, v in tasks.items() if k != "folder"}, **rows} if rows else {}


def _make(
    name: str,
    recipes: Mapping[str, Mapping[str, Any]],
    average: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> ScoredAdapter:
    settings: dict[str, Any] = {}
    seeds: dict[str, Any] = {}
    for prefix, recipe in recipes.items():
        without, of_seeds = split_seeds(recipe, free=FREE if prefix else ())
        settings |= {prefix + key: value for key, value in without.items()}
        seeds |= {prefix + key: value for key, value in of_seeds.items()}
    way = {f"average.{key}": value for key, value in (average or {}).items()}
    if "average.seed" in way:
        seeds["average.seed"] = way.pop("average.seed")
    if "average.trainable" in way:
        settings["average.trainable"] = way.pop("average.trainable")
    return ScoredAdapter(
        name=name, settings=settings, seeds=seeds, extra_steps=steps, schedule=way if steps else {}
    )


def split_seeds(
    tree: Mapping[str, Any], *, free: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a recipe by dotted names, without those of places; and its seeds."""
    settings: dict[str, Any] = {}
    seeds: dict[str, Any] = {}
    for key, value in dotted(tree).items():
        name = key.rpartition(".")[2]
        if name in ("seed", "seeds") or name.endswith("_seed"):
            seeds[key] = value
        elif key not in free and key not in OF_PLACES and key.split(".")[0] not in OF_PLACES:
            settings[key] = value
    return settings, seeds


def _averaged(adapter: Path, runs: Sequence[Run]) -> tuple[Path, int | None, dict[str, Any]]:
    """The run behind an adapter, its extra steps (None: no average), and how those were made.

    An averaged adapter's card says what it was averaged from, wherever its folder lies now.
    """
    for place in _places(adapter, runs):
        origin = _origin(place)
        steps, source = origin.get("extra_steps"), origin.get("averaged_from")
        if isinstance(steps, int) and isinstance(source, str):
            names = ("trainable", "seed", "schedule_steps", "warmup_fraction")
            return Path(source), steps, {name: origin[name] for name in names if name in origin}
    folder, at = adapter, None
    if folder.parent.name == "averaged" and folder.name.isdigit():
        folder, at = folder.parent.parent, int(folder.name)
    average = recipe_of(folder, "average.yaml", runs)
    if not average:
        return folder, at, {}
    way = {
        "trainable": average.get("trainable", "mean"),
        "seed": part(average, "run").get("seed"),
        "schedule_steps": extra_steps(average)[-1],
        "warmup_fraction": average.get("warmup_fraction"),
    }
    return Path(str(average.get("source"))), extra_steps(average)[-1] if at is None else at, way


def _origin(adapter: Path) -> Mapping[str, Any]:
    """The `origin` of an adapter's card; empty if it cannot be read."""
    for file in (adapter / CARD, adapter / "adapter" / CARD):
        if file.is_file():
            try:
                return part(read_object(file, RunError), "origin")
            except RunError:  # the report can do without it
                return {}
    return {}


def _places(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Where a folder of a recipe may lie: there, or in a given run that was written there."""
    places = [folder]
    for run in runs:
        for recipe in (run.config, run.average):
            written = part(recipe, "run").get("folder")
            if written and folder.is_relative_to(str(written)):
                places.append(run.folder / folder.relative_to(str(written)))
    return places


def recipe_of(folder: Path, name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A recipe file of a folder, or of a given run that was written there; else empty."""
    for place in _places(folder, runs):
        try:
            if recipe := read_tree(place / name):
                return recipe
        except RunError:  # the report can do without it
            continue
    return {}


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


def find_differences(adapters: Mapping[str, ScoredAdapter]) -> list[str]:
    """In what evaluations, by their labels, differ besides their seeds; one line each.

    Settings that only some have are left out where it was other things that were scored.
    """
    lines = []
    is_one_thing = len({adapter.name for adapter in adapters.values()}) == 1
    every = {label: {"scored": a.name, **a.everything} for label, a in adapters.items()}
    for key in dict.fromkeys(key for settings in every.values() for key in settings):
        values: dict[str, list[str]] = {}
        for label, settings in every.items():
            said = as_written(settings[key]) if key in settings else "not set"
            values.setdefault(said, []).append(label)
        if len(values) > 1 and (is_one_thing or "not set" not in values):
            listed = ", ".join(f"{said} ({', '.join(who)})" for said, who in values.items())
            lines.append(f"{key} is {listed}")
    return lines
