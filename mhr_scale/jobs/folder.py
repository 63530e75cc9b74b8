"""The run folder of `adapt`: jobs can be added to it, but not changed."""

from dataclasses import replace

from mhr_scale.config import AdaptConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.jobs.adapt_inputs import AdaptInputs
from mhr_scale.jobs.job import as_folder
from mhr_scale.run.run_folder import REJECTS, RunFolder, differences

#: Settings that may differ when a run resumes: which jobs there are, where and how fast they run.
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
    """Open the folder of a run; raises `RunError` if it holds jobs of other settings."""
    folder = RunFolder(config.run.folder, AdaptConfig, free=FREE)
    stored = folder.read_recipe()
    before = {} if stored is None else stored.variants
    changed = [
        f"variants.{name}.{difference}"
        for name in sorted(before.keys() & config.variants.keys())
        for _, difference in differences(before[name], config.variants[name])
    ]
    folder.check(
        config,
        is_begun=stored is not None and any(folder.path.glob("jobs/*/*/*")),
        holds="jobs",
        more=changed,
        way_out="tasks, seeds and variants can be added, anything else needs another run.folder",
    )
    return folder


def rank0_begin(folder: RunFolder[AdaptConfig], inputs: AdaptInputs, engine: Engine) -> None:
    """Write the recipe, the rejected rows and the provenance of a run.

    A variant that has jobs stays in the stored recipe, even if the new one leaves it out: it must
    not come back with other settings.
    """
    config, stored = inputs.config, folder.read_recipe()
    started = {job.name for job in folder.path.glob("jobs/*/*/*")}
    known = {} if stored is None else stored.variants
    variants = {name: variant for name, variant in known.items() if as_folder(name) in started}
    folder.keep_recipe(replace(config, variants={**variants, **config.variants}))
    inputs.intake.write(folder.path / REJECTS)
    folder.record_start(
        **engine.facts,
        backbone=inputs.backbone.blueprint.facts,
        stored_precision=inputs.precisions,
    )
