"""The verb `adapt`: few-shot tasks x seeds x variants in, one adapter per job and a table out.

<run folder>/  jobs/<task>/<seed>/<variant>/  adapter/  metrics.jsonl  scores.jsonl  result.json
                                              backbone.safetensors (kind backbone)
               summary.json                   the table's numbers, made from the results alone
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mhr_scale import comparison, fingerprint
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.adapters.methods import wrap
from mhr_scale.config import AdaptConfig
from mhr_scale.engine import Engine, read_ds_config
from mhr_scale.errors import DivergenceError
from mhr_scale.files import write_json
from mhr_scale.jobs import soup
from mhr_scale.jobs.folder import check_folder, rank0_open_folder
from mhr_scale.jobs.full import FullWave, check_backbone_jobs
from mhr_scale.jobs.job import Job, Stage, read_results, stage
from mhr_scale.jobs.opening import Opening, all_sites, open_jobs
from mhr_scale.jobs.plan import LARGEST, Outlook, Planned, deal, plan_waves, wave_size
from mhr_scale.jobs.runner import Runner, saved_of
from mhr_scale.jobs.start import source_numbers, start
from mhr_scale.jobs.wave import Member, Wave
from mhr_scale.planning.waves import job_bytes
from mhr_scale.runlog import log
from mhr_scale.runs import (
    backbone_facts,
    check_quantise,
)


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
            "lower optim.lr or the variant's lr; all other jobs are finished"
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
        look_out(opening, job, stages[job].step)
        for job in opening.jobs
        if not stages[job].is_finished
    ]
    pending = {outlook.job.variant for outlook in outlooks}
    soups = find_soups(opening, engine, model, linears, pending)
    alone = [name for name, variant in config.variants.items() if variant.kind == "backbone"]
    size = config.waves.size or fitting_size(opening, outlooks, engine, alone=alone)
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


def look_out(opening: Opening, job: Job, step: int) -> Outlook:
    """What a job will take."""
    data = opening.data[job.task, job.seed]
    width, depth = data.shape
    scored = sum(len(row.input_ids) + row.n_choice_tokens for row in data.test.rows)
    return Outlook(
        job=job,
        step=step,
        steps=opening.steps(job),
        batch_size=data.batch_size,
        width=width,
        depth=depth,
        scored_tokens=scored,
    )


def open_wave(
    opening: Opening,
    planned: Planned,
    soups: Mapping[tuple[str, str, int], Sequence[str]],
    *,
    device: torch.device,
) -> Wave:
    """A wave at its jobs' start or at their saved step."""
    config, name = opening.config, planned.variant
    variant, run = config.variants[name], Path(config.run.folder)
    kind = FullWave if variant.kind == "backbone" else Wave
    members = [Member(o.job, opening.data[o.job.task, o.job.seed], o.steps) for o in planned.jobs]
    if planned.step:
        saved = [saved_of(member, run, planned.step) for member in members]
        adapters = [one.adapter for one in saved]
        return kind.open(config, variant, members, adapters, device=device, saved=saved)
    adapters = [
        start(
            member.job,
            variant,
            opening.source(name),
            sites=opening.sites[name],
            similar=soups.get((name, member.job.task, member.job.seed), ()),
        )
        for member in members
    ]
    return kind.open(config, variant, members, adapters, device=device)


def find_soups(
    opening: Opening,
    engine: Engine,
    model: Any,
    linears: Mapping[str, AdaptedLinear],
    pending: set[str],
) -> dict[tuple[str, str, int], list[str]]:
    """The similar training tasks of pending (variant, task, seed) of kind soup. Collective."""
    found: dict[tuple[str, str, int], list[str]] = {}
    for name, variant in opening.config.variants.items():
        source = opening.source(name)
        if variant.kind != "soup" or source is None or name not in pending:
            continue
        new = {key: data.few_shot.task for key, data in opening.data.items()}
        kitchen = soup.Kitchen(
            engine=engine,
            model=model,
            linears=linears,
            tokenizer=opening.tokenizer,
            max_input_tokens=opening.config.protocol.max_input_tokens,
        )
        similar = soup.find_similar(
            str(variant.adapter), source.task_names, new, variant.soup, kitchen
        )
        found |= {(name, task, seed): names for (task, seed), names in similar.items()}
    return found


def facts_of(
    opening: Opening, soups: Mapping[tuple[str, str, int], Sequence[str]], job: Job
) -> dict[str, Any]:
    """What a job's result says of where it started."""
    source, variant = opening.source(job.variant), opening.config.variants[job.variant]
    numbers = 0 if source is None else source_numbers(source)
    facts = {"kind": variant.kind, "adapter": variant.adapter, "source_numbers": numbers}
    chosen = soups.get((job.variant, job.task, job.seed))
    return facts if chosen is None else {**facts, "soup": list(chosen)}


def fitting_size(
    opening: Opening, outlooks: Sequence[Outlook], engine: Engine, *, alone: Sequence[str]
) -> int:
    """Jobs per wave that the memory of this machine holds; the smallest number of all ranks.

    Collective. A step is counted only where some wave could have more than one job.
    """
    waves = plan_waves(outlooks, size=LARGEST, world_size=engine.world_size, alone=alone)
    if all(len(wave.jobs) == 1 for wave in waves):
        return 1
    able = [one for one in outlooks if one.job.variant not in alone]
    needed = job_bytes(opening, able, on_gpu=engine.device.type == "cuda")
    return min(engine.gather_objects(wave_size(engine.free_bytes(), needed)))


# -- the table -------------------------------------------------------------------------------------


def report(opening: Opening, folder: Path) -> None:
    """Write the summary of all finished jobs and print its tables."""
    results = read_results(opening.jobs, folder)
    if not results:
        return
    found = comparison.compare(results, tasks={job.task for job in opening.jobs})
    write_json(folder / "summary.json", found)
    log.info("\n%s\n  jobs     %s", comparison.table(found), folder / "jobs")
