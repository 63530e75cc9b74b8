"""The run folder of `adapt`: jobs can be added to it, but not changed."""

from dataclasses import replace

from mhr_scale.config import AdaptConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.jobs.adapt_inputs import AdaptInputs
from mhr_scale.jobs.job import as_folder
from mhr_scale.run.run_folder import REJECTS, RunFolder, differences

#: Settings that may differ when a run goes on: which jobs there are, where and how fast they run.
FREE = (
    "shots.seeds",
    "tasks.tasks",
    "waves.",
    "run.",
    "backbone.recompute",
    "backbone_moved_to",
    "variants.",
)


def open_folder(config: AdaptConfig) -> RunFolder[AdaptConfig]:
    """The folder of a run, found good; raises `RunError` if it holds jobs of other settings."""
    folder = RunFolder(config.run.folder, AdaptConfig, free=FREE)
    folder.check_writable()
    kept = folder.read_recipe()
    before = {} if kept is None else kept.variants
    changed = [
        f"variants.{name}.{difference}"
        for name in sorted(before.keys() & config.variants.keys())
        for _, difference in differences(before[name], config.variants[name])
    ]
    folder.check(
        config,
        is_begun=kept is not None and any(folder.path.glob("jobs/*/*/*")),
        holds="jobs",
        more=changed,
        way_out="tasks, seeds and variants can be added, anything else needs another run.folder",
    )
    return folder


def rank0_begin(folder: RunFolder[AdaptConfig], inputs: AdaptInputs, engine: Engine) -> None:
    """Write what a reader of the run needs before its first number.

    A variant that has jobs stays in the stored recipe, also where the new one leaves it out: under
    other settings it must not come back.
    """
    config, kept = inputs.config, folder.read_recipe()
    begun = {job.name for job in folder.path.glob("jobs/*/*/*")}
    known = {} if kept is None else kept.variants
    variants = {name: variant for name, variant in known.items() if as_folder(name) in begun}
    folder.keep_recipe(replace(config, variants={**variants, **config.variants}))
    inputs.intake.write(folder.path / REJECTS)
    folder.record_start(**engine.facts, backbone=inputs.backbone.blueprint.facts)
