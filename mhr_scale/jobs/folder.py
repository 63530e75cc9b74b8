"""The run folder of `adapt`: jobs can be added to it, but not changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mhr_scale.config import AdaptConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.jobs.adapt_inputs import AdaptInputs
from mhr_scale.jobs.job import Job, as_folder
from mhr_scale.run import repositories
from mhr_scale.run.files import names_in
from mhr_scale.run.run_folder import REJECTS, RunFolder, differences

#: Settings that may differ when a run resumes: which jobs there are, where and how fast they run.
FREE = (
    "shots.seeds",
    "tasks.tasks",
    "waves.",
    "run.",
    "backbone.mapped",
    "backbone.recompute",
    "backbone_moved_to",
    "scoring.texts",
    "variants.",
    "gain_over",
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
        is_begun=has_jobs(folder),
        holds="jobs",
        more=changed,
        way_out="tasks, seeds and variants can be added, anything else needs another run.folder",
    )
    return folder


def has_jobs(folder: RunFolder[AdaptConfig]) -> bool:
    """Whether some job has begun."""
    return bool(begun_variants(folder))


def begun_variants(folder: RunFolder[AdaptConfig]) -> set[str]:
    """Names of the folders of variants that have jobs."""
    jobs = folder.path / "jobs"
    tasks = (jobs / task for task in names_in(jobs))
    seeds = (task / seed for task in tasks for seed in names_in(task))
    return {variant for seed in seeds for variant in names_in(seed)}


def check_inputs(folder: RunFolder[AdaptConfig], contents: Mapping[str, str]) -> None:
    """Raise `RunError` if jobs have begun with another adapter, other rows, another backbone."""
    folder.check_inputs(contents, is_begun=has_jobs(folder), holds="jobs")


def gather_kept_soups(
    folder: RunFolder[AdaptConfig], soups: Mapping[Job, Sequence[str]], engine: Engine
) -> None:
    """Raise `RunError` if jobs have begun with other soups, else write these down. Collective."""
    inputs = {f"soup of {job.name}": ", ".join(names) for job, names in soups.items()}
    folder.check_inputs(inputs, is_begun=True, holds="jobs")
    engine.gather_barrier()
    if engine.rank == 0:
        folder.keep_inputs(inputs, is_begun=True)


def rank0_begin(
    folder: RunFolder[AdaptConfig],
    inputs: AdaptInputs,
    contents: Mapping[str, str],
    placed: PlacedBackbone,
) -> None:
    """Write the recipe, the rejected rows and the provenance of a run.

    A variant that has jobs stays in the stored recipe, even if the new one leaves it out: it must
    not come back with other settings.
    """
    config, stored = inputs.config, folder.read_recipe()
    started = begun_variants(folder)
    known = {} if stored is None else stored.variants
    variants = {name: variant for name, variant in known.items() if as_folder(name) in started}
    folder.keep_recipe(replace(config, variants={**variants, **config.variants}))
    folder.keep_inputs(contents, is_begun=bool(started))
    inputs.intake.write(folder.path / REJECTS)
    folder.record_start(
        **placed.engine.facts,
        backbone=inputs.backbone.blueprint.facts,
        adapters={path: repositories.last_found(path).facts for path in inputs.sources},
        stored_precision=inputs.precisions,
        packing=placed.lays_flat(config.waves.packing, "waves.packing"),
    )
