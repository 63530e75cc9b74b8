"""The run folder of `adapt`: jobs can be added to it, but not changed."""

from pathlib import Path

from mhr_scale.backbone import Blueprint
from mhr_scale.config import AdaptConfig
from mhr_scale.engine import Engine
from mhr_scale.errors import RunError
from mhr_scale.recipe import to_yaml
from mhr_scale.runlog import record_provenance, write_text
from mhr_scale.runs import check_writable, differences, read_recipe
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
    before = read_recipe(AdaptConfig, file)
    changed = [
        difference
        for key, difference in differences(before, config)
        if not key.startswith(FREE_TO_CHANGE)
    ]
    changed += [
        f"variant {name} is another one"
        for name in before.variants.keys() & config.variants.keys()
        if before.variants[name] != config.variants[name]
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
