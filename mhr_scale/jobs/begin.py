"""A wave of jobs at their start or at their saved step, and the soups that some start from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.engine.engine import Engine
from mhr_scale.jobs import soup
from mhr_scale.jobs.full import FullWave
from mhr_scale.jobs.job import Job, Standing
from mhr_scale.jobs.opened_jobs import Opening
from mhr_scale.jobs.scheduling import Planned
from mhr_scale.jobs.start import source_numbers, start
from mhr_scale.jobs.wave import Member, Wave
from mhr_scale.training import checkpoint

#: The similar training tasks of jobs of kind soup.
Soups = Mapping[Job, Sequence[str]]


def gather_soups(
    opening: Opening,
    engine: Engine,
    model: Any,
    linears: Mapping[str, AdaptedLinear],
    pending: set[str],
) -> dict[Job, list[str]]:
    """The similar training tasks of every job of the pending variants of kind soup. Collective."""
    kitchen = soup.Kitchen(
        engine=engine,
        model=model,
        linears=linears,
        tokenizer=opening.tokenizer,
        max_input_tokens=opening.config.protocol.max_input_tokens,
    )
    new = {key: data.few_shot.task for key, data in opening.data.items()}
    found = {}
    for name, variant in opening.config.variants.items():
        source = opening.source(name)
        if variant.kind != "soup" or source is None or name not in pending:
            continue
        similar = soup.gather_similar(
            str(variant.adapter), source.task_names, new, variant.soup, kitchen
        )
        for (task, seed), names in similar.items():
            found[Job(task=task, seed=seed, variant=name)] = names
    return found


def open_wave(opening: Opening, planned: Planned, soups: Soups, *, device: torch.device) -> Wave:
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
            similar=soups.get(member.job, ()),
        )
        for member in members
    ]
    return kind.open(config, variant, members, adapters, device=device)


def saved_of(member: Member, run: Path, step: int) -> checkpoint.Saved:
    """A job's saved step, its standing put back into the member."""
    folder = member.job.folder(run)
    saved = checkpoint.read(folder, step)
    member.standing = Standing.read(saved.progress, place=checkpoint.step_folder(folder, step))
    return saved


def facts_of(opening: Opening, soups: Soups, job: Job) -> dict[str, Any]:
    """What a job's result says of where it started."""
    source, variant = opening.source(job.variant), opening.config.variants[job.variant]
    numbers = 0 if source is None else source_numbers(source)
    facts = {"kind": variant.kind, "adapter": variant.adapter, "source_numbers": numbers}
    return {**facts, "soup": list(soups[job])} if job in soups else facts
