"""The verb `adapt`: few-shot tasks x seeds x variants in, one adapter per job and a table out.

<run folder>/  jobs/<task>/<seed>/<variant>/  adapter/  metrics.jsonl  scores.jsonl  result.json
                                              backbone.safetensors (kind backbone)
               summary.json                   the table's numbers, made from the results alone
"""

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.adapters.methods import wrap
from mhr_scale.backbone import fingerprint
from mhr_scale.backbone.of_adapter import backbone_facts
from mhr_scale.config import AdaptConfig
from mhr_scale.engine.ds_config import check_quantise, read_ds_config
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import DivergenceError
from mhr_scale.jobs.begin import facts_of, gather_soups, open_wave
from mhr_scale.jobs.folder import check_folder, rank0_open_folder
from mhr_scale.jobs.full import check_backbone_jobs
from mhr_scale.jobs.job import Job, Stage, read_results, stage
from mhr_scale.jobs.opened_jobs import Opening, all_sites, open_jobs
from mhr_scale.jobs.runner import Runner
from mhr_scale.jobs.scheduling import deal, plan_waves
from mhr_scale.planning.wave_size import gather_wave_size
from mhr_scale.run.files import write_json
from mhr_scale.run.runlog import log
from mhr_scale.scores import comparison


def adapt(config: AdaptConfig) -> Path:
    """Adapt to every task, seed and variant; returns the run folder.

    Collective. The same command goes on with unfinished jobs and runs those that are new in the
    recipe. Raises `DivergenceError` at the end if the loss of some jobs was no number.
    """
    folder = Path(config.run.folder)
    ds_content = read_ds_config(config.run.ds_config)
    check_folder(config)
    opening = open_jobs(config)
    check_backbone_jobs(config, opening.backbone, ds_content)
    check_quantise(opening.backbone, opening.blueprint, ds_content, config.run.ds_config)
    engine = Engine(ds_content, timeout_seconds=config.run.timeout_seconds)
    try:
        engine.open_patient_group()
        model = engine.build(opening.backbone, opening.blueprint)
        linears = wrap(model, all_sites(opening, model))
        model = engine.prepare(model, opening.backbone, always_backward=True)
        fingerprint.check(model, opening.blueprint, opening.backbone, engine)
        if engine.rank == 0:
            rank0_open_folder(config, engine, opening.blueprint, opening.intake)
        lost = run_jobs(opening, engine, model, linears)
        engine.wait_for_all()
        lost = sorted(itertools.chain(*engine.gather_objects(lost)))
        if engine.rank == 0:
            report(opening, folder)
        engine.gather_barrier()
    finally:
        engine.close()
    if lost:
        raise DivergenceError(
            f"{len(lost)} job(s) given up, loss or scores not finite: {', '.join(lost[:5])}; "
            "lower optim.lr in another run.folder, or add variants of a lower lr; all other jobs "
            "are finished"
        )
    return folder


# -- the jobs --------------------------------------------------------------------------------------


def run_jobs(
    opening: Opening, engine: Engine, model: Any, linears: Mapping[str, AdaptedLinear]
) -> list[str]:
    """Plan waves, run this rank's, and keep the others company; returns the jobs given up."""
    config, folder = opening.config, Path(opening.config.run.folder)
    stages: dict[Job, Stage] = engine.broadcast_object(
        {job: stage(job, folder) for job in opening.jobs} if engine.rank == 0 else None
    )
    outlooks = [
        opening.outlook(job, step=stages[job].step)
        for job in opening.jobs
        if not stages[job].is_finished
    ]
    pending = {outlook.job.variant for outlook in outlooks}
    soups = gather_soups(opening, engine, model, linears, pending)
    size = config.waves.size or gather_wave_size(opening, outlooks, engine)
    alone = config.backbone_variants
    waves = plan_waves(outlooks, size=size, world_size=engine.world_size, alone=alone)
    dealt = deal(waves, engine.world_size)
    log.info(
        "%d jobs (%d tasks and seeds x %d variants), %d finished; %d waves of at most %d jobs on "
        "%d rank(s), %s",
        len(opening.jobs),
        len(opening.data),
        len(config.variants),
        len(opening.jobs) - len(outlooks),
        len(waves),
        size,
        engine.world_size,
        engine.placement,
    )
    mine = dealt[engine.rank]
    runner = Runner(
        config,
        engine=engine,
        model=model,
        linears=linears,
        tokenizer=opening.tokenizer,
        backbone_facts=backbone_facts(opening.backbone, opening.blueprint),
        total_steps=sum(o.steps - o.step for wave in mine for o in wave.jobs),
    )
    for planned in mine:
        wave = open_wave(opening, planned, soups, device=engine.device)
        with wave.thawed(model):
            runner.run(wave, partial(facts_of, opening, soups))
    runner.close()
    return runner.lost


# -- the table -------------------------------------------------------------------------------------


def report(opening: Opening, folder: Path) -> None:
    """Write the summary of all finished jobs and print its tables."""
    results = read_results(opening.jobs, folder)
    if not results:
        return
    found = comparison.compare(results, tasks={job.task for job in opening.jobs})
    write_json(folder / "summary.json", found)
    log.info("\n%s\n  jobs     %s", comparison.table(found), folder / "jobs")
