"""The run folder of `adapt`: jobs can be added to it, but not changed."""

from dataclasses import replace
from pathlib import Path

from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.config import AdaptConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import RunError
from mhr_scale.jobs.job import as_folder
from mhr_scale.run.run_folder import check_writable, differences, listed, read_recipe, write_recipe
from mhr_scale.run.runlog import record_provenance
from mhr_scale.tasks.task import Intake

#: Settings that may differ when a run goes on: which jobs there are, where and how fast they run.
FREE_TO_CHANGE = (
    "shots.seeds",
    "tasks.tasks",
    "waves.",
    "run.",
    "backbone.recompute",
    "backbone_moved_to",
    "variants.",
)


def check_folder(config: AdaptConfig) -> None:
    """Raise `RunError` if the folder holds jobs of other settings."""
    folder = Path(config.run.folder)
    check_writable(folder)
    file = folder / "config.yaml"
    if not file.exists():
        return
    before = read_recipe(AdaptConfig, file)
    changed = [
        difference
        for key, difference in differences(before, config)
        if not key.startswith(FREE_TO_CHANGE)
    ]
    for name in sorted(before.variants.keys() & config.variants.keys()):
        pairs = differences(before.variants[name], config.variants[name])
        changed += [f"variants.{name}.{difference}" for _, difference in pairs]
    if changed and any(folder.glob("jobs/*/*/*")):
        raise RunError(
            f"{folder}: holds jobs of other settings ({listed(changed)}); tasks, seeds and "
            "variants can be added, anything else needs another run.folder"
        )


def rank0_open_folder(
    config: AdaptConfig, engine: Engine, blueprint: Blueprint, intake: Intake
) -> None:
    """Write what a reader of the run needs before its first number.

    A variant that has jobs stays in the stored recipe, also where the new one leaves it out: under
    other settings it must not come back.
    """
    folder = Path(config.run.folder)
    file = folder / "config.yaml"
    known = read_recipe(AdaptConfig, file).variants if file.exists() else {}
    begun = {job.name for job in folder.glob("jobs/*/*/*")}
    kept = {name: variant for name, variant in known.items() if as_folder(name) in begun}
    write_recipe(file, replace(config, variants={**kept, **config.variants}))
    intake.write(folder / "rejects.jsonl")
    record_provenance(
        folder / "provenance.json",
        world_size=engine.world_size,
        device=str(engine.device),
        placement=engine.placement,
        backbone=blueprint.facts,
    )
