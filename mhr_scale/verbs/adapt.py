"""The verb `adapt`: few-shot tasks x seeds x variants in, one adapter per job and a table out.

<run folder>/  jobs/<task>/<seed>/<variant>/  adapter/  metrics.jsonl  scores.jsonl  result.json
                                              backbone.safetensors (kind backbone)
               summary.json                   the table's numbers, computed from the results alone
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mhr_scale.config import AdaptConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import DivergenceError
from mhr_scale.jobs.adapt_inputs import AdaptInputs, open_jobs
from mhr_scale.jobs.folder import check_inputs, gather_kept_soups, open_folder, rank0_begin
from mhr_scale.jobs.job import Job, JobState, find_state, read_results
from mhr_scale.jobs.open_waves import facts_of, gather_soups, open_wave
from mhr_scale.jobs.runner import Runner
from mhr_scale.jobs.scheduling import assign_waves, plan_waves
from mhr_scale.planning.wave_size import gather_wave_size
from mhr_scale.run import tracking
from mhr_scale.run.files import write_json
from mhr_scale.run.run_folder import RunFolder, owned_folder
from mhr_scale.run.runlog import log
from mhr_scale.run.streams import write_result
from mhr_scale.scores import comparison


def adapt(config: AdaptConfig) -> Path:
    """Adapt to every task, seed and variant; returns the run folder.

    Collective. The same command continues unfinished jobs and runs those that are new in the
    recipe. Raises `DivergenceError` at the end if the loss of some jobs was not finite.
    """
    with owned_folder(config.run.folder):
        return run_all(config)


def run_all(config: AdaptConfig) -> Path:
    """Run all jobs that are not finished, in a folder that this launch owns. Collective."""
    folder = open_folder(config)
    tracking.check(config.run.trackers)
    inputs = open_jobs(config)
    contents = inputs.contents
    check_inputs(folder, contents)
    selected_on = {task: data.selects_on for (task, _), data in inputs.data.items()}
    with inputs.backbone.placed(inputs.list_sites(), always_backward=True) as placed:
        engine = placed.engine
        engine.open_patient_group()
        if engine.rank == 0:
            rank0_begin(folder, inputs, contents, placed)
        lost = run_jobs(folder, inputs, placed)
        engine.wait_for_all()
        lost = sorted(itertools.chain(*engine.gather_objects(lost)))
        if engine.rank == 0:
            report(inputs.jobs, selected_on, folder.path, gain_over=config.gain_over)
        engine.gather_barrier()
    if lost:
        raise DivergenceError(
            f"{len(lost)} job(s) given up, loss or scores not finite: {', '.join(lost[:5])}; "
            "lower optim.lr in another run.folder, or add variants of a lower lr; all other jobs "
            "are finished"
        )
    return folder.path


def run_jobs(
    folder: RunFolder[AdaptConfig], inputs: AdaptInputs, placed: PlacedBackbone
) -> list[str]:
    """Plan the waves and run this rank's; returns the jobs given up. Only its rows are kept.

    A rank without jobs left runs dummy passes until all ranks are done. Collective.
    """
    config, engine = inputs.config, placed.engine
    states: dict[Job, JobState] = engine.broadcast_object(
        {job: find_state(job, folder.path) for job in inputs.jobs} if engine.rank == 0 else None
    )
    estimates = [
        inputs.estimate(job, step=states[job].step)
        for job in inputs.jobs
        if not states[job].is_finished
    ]
    pending = {estimate.job.variant for estimate in estimates}
    soups = gather_soups(inputs, placed, pending)
    gather_kept_soups(folder, soups, engine)
    size = config.waves.size or gather_wave_size(inputs, estimates, engine)
    alone = config.backbone_variants
    waves = plan_waves(estimates, size=size, world_size=engine.world_size, alone=alone)
    log.info(
        "%d jobs (%d tasks and seeds x %d variants), %d finished; %d waves of at most %d jobs on "
        "%d rank(s), %s; rows are %s",
        len(inputs.jobs),
        len(inputs.data),
        len(config.variants),
        len(inputs.jobs) - len(estimates),
        len(waves),
        size,
        engine.world_size,
        engine.placement,
        "packed" if placed.lays_flat(config.waves.packing, "waves.packing") else "padded",
    )
    own_waves = assign_waves(waves, engine.world_size)[engine.rank]
    inputs.keep_rows([estimate.job for wave in own_waves for estimate in wave.jobs])
    runner = Runner(
        config,
        placed=placed,
        tokenizer=inputs.backbone.tokenizer,
        backbone_facts=inputs.backbone.facts,
        total_steps=sum(job.steps - job.step for wave in own_waves for job in wave.jobs),
    )
    for planned in own_waves:
        wave = open_wave(inputs, planned, soups, device=engine.device)
        with wave.thawed(placed.model):
            runner.run(wave, partial(facts_of, inputs, soups))
    runner.close()
    return runner.lost


def report(
    jobs: Sequence[Job], selected_on: Mapping[str, str], folder: Path, *, gain_over: str | None
) -> None:
    """Write the summary of all finished jobs and print its tables.

    `selected_on` is what the checkpoints of each task's jobs were selected on, `gain_over` the
    variant that gains are measured against.
    """
    results = read_results(jobs, folder)
    if not results:
        return
    tasks = {job.task for job in jobs}
    compared = comparison.compare(results, tasks=tasks, gain_over=gain_over)
    write_json(folder / "summary.json", {**compared, "selected_on": selected_on})
    log.info("jobs in %s", folder / "jobs")
    write_result(comparison.table(compared))
