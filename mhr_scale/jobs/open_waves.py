"""Opening waves, at their jobs' start or saved step, and the soups that some start from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mhr_scale.config import precision_of
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.jobs import soup
from mhr_scale.jobs.adapt_inputs import AdaptInputs
from mhr_scale.jobs.full import FullWave
from mhr_scale.jobs.job import Job, JobProgress
from mhr_scale.jobs.scheduling import PlannedWave
from mhr_scale.jobs.start import source_numbers, start
from mhr_scale.jobs.wave import Member, Wave
from mhr_scale.training import checkpoint, saved_steps

#: The similar training tasks of jobs of kind soup.
Soups = Mapping[Job, Sequence[str]]


def gather_soups(
    inputs: AdaptInputs, placed: PlacedBackbone, pending: set[str]
) -> dict[Job, list[str]]:
    """The similar training tasks of every job of the pending variants of kind soup. Collective."""
    embedder = soup.TaskEmbedder(
        placed=placed,
        tokenizer=inputs.backbone.tokenizer,
        lengths=inputs.config.protocol.lengths,
    )
    new = {key: data.few_shot.task for key, data in inputs.data.items()}
    soups = {}
    for name, variant in inputs.config.variants.items():
        source = inputs.source(name)
        if variant.kind != "soup" or source is None or name not in pending:
            continue
        similar = soup.gather_similar(
            str(variant.adapter), source.task_names, new, variant.soup, embedder
        )
        for (task, seed), names in similar.items():
            soups[Job(task=task, seed=seed, variant=name)] = names
    return soups


def open_wave(
    inputs: AdaptInputs, planned: PlannedWave, soups: Soups, *, device: torch.device
) -> Wave:
    """Open a wave, at its jobs' start or at their saved step."""
    config, name = inputs.config, planned.variant
    variant, run = config.variants[name], Path(config.run.folder)
    kind = FullWave if variant.kind == "backbone" else Wave
    members = [
        Member(estimate.job, inputs.data[estimate.job.task, estimate.job.seed], estimate.steps)
        for estimate in planned.jobs
    ]
    if planned.step:
        saved = [_read_saved(member, run, planned.step) for member in members]
        adapters = [job.adapter for job in saved]
        return kind.open(config, variant, members, adapters, device=device, saved=saved)
    adapters = [
        start(
            member.job,
            variant,
            inputs.source(name),
            sites=inputs.sites[name],
            similar=soups.get(member.job, ()),
        )
        for member in members
    ]
    return kind.open(config, variant, members, adapters, device=device)


def _read_saved(member: Member, run: Path, step: int) -> checkpoint.Saved:
    """Read a job's saved step, and restore its progress into the member."""
    folder = member.job.folder(run)
    saved = checkpoint.read(folder, step)
    place = saved_steps.step_folder(folder, step)
    member.progress = JobProgress.read(saved.progress, place=place)
    return saved


def facts_of(inputs: AdaptInputs, soups: Soups, job: Job) -> dict[str, Any]:
    """The entries of a job's result that say what it started from."""
    source, variant = inputs.source(job.variant), inputs.config.variants[job.variant]
    numbers = 0 if source is None else source_numbers(source)
    facts = {
        "kind": variant.kind,
        "adapter": variant.adapter,
        "source_numbers": numbers,
        "precision": precision_of(inputs.backbone.facts),
        "stored_precision": inputs.precisions.get(variant.adapter or "", "float32"),
    }
    return {**facts, "soup": list(soups[job])} if job in soups else facts
