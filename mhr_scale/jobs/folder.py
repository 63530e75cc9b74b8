"""The run folder of `adapt`: jobs can be added to it, but not changed."""

from pathlib import Path

import yaml

from mhr_scale.backbone import Blueprint
from mhr_scale.config import AdaptConfig
from mhr_scale.engine import Engine
from mhr_scale.errors import RunError
from mhr_scale.recipe import to_yaml
from mhr_scale.runlog import record_provenance, write_text
from mhr_scale.runs import check_writable, flatten
from mhr_scale.tasks.task import Intake

#: Settings that may differ when a run goes on: which jobs there are, where and how fast they run.
FREE_TO_CHANGE = ("shots.seeds", "tasks.tasks", "waves.", "run.", "backbone.recompute", "variants.")


def check_folder(config: AdaptConfig) -> None:
    """Raise `RunError` if the folder holds jobs of other settings."""
    folder = Path(config.run.folder)
    check_writable(folder)
    file = folder / "config.yaml"
    if not file.exists():
        return
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8"))
        before, variants = flatten(stored), stored["variants"]
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not readable ({error!r}); use another run.folder") from error
    recipe = yaml.safe_load(to_yaml(config))
    now = flatten(recipe)
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    changed += [
        f"variant {name} is another one"
        for name in variants.keys() & recipe["variants"].keys()
        if variants[name] != recipe["variants"][name]
    ]
    if changed and any(folder.glob("jobs/*/*/*")):
        raise RunError(
            f"{folder}: holds jobs of other settings ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}); tasks, seeds and variants can be added, "
            "anything else needs another run.folder"
        )


def rank0_open_folder(
    config: AdaptConfig, engine: Engine, blueprint: Blueprint, intake: Intake
) -> None:
    """Write what a reader of the run needs before its first number."""
    folder = Path(config.run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise RunError(f"run.folder: cannot write to {folder} ({error.strerror})") from error
    intake.write(folder / "rejects.jsonl")
    record_provenance(
        folder / "provenance.json",
        world_size=engine.world_size,
        device=str(engine.device),
        placement=engine.placement,
        backbone=blueprint.facts,
    )
