"""Jobs with drawn gradients and rates: each alone, and stacked in a wave."""

from dataclasses import replace

import torch
from adapters.tiny import randomise, tensors_of
from torch import Tensor

from mhr_scale.adapters import Adapter, AdapterConfig
from mhr_scale.adapters.sites import Site
from mhr_scale.config import OptimConfig
from mhr_scale.jobs.job_optim import clip_jobs, make_job_optimizer, set_job_rates
from mhr_scale.training.optim import (
    clip_gradients,
    gradient_norm,
    has_row_gradients,
    make_optimizer,
)

N_JOBS, STEPS, CLIP_NORM = 3, 12, 1.0
PLACES = [f"job {number}" for number in range(N_JOBS)]
SITES = tuple(
    Site(name=name, in_features=i, out_features=o, stack="encoder", block=n, sublayer=0)
    for n, (name, i, o) in enumerate([("x", 8, 12), ("y", 8, 12), ("z", 12, 8)])
)
CONFIGS = {
    "MHR": AdapterConfig(n_skills=3, n_splits=4, rank=2),
    "Poly, rank 1": AdapterConfig(n_skills=3, granularity="stack"),
    "uniform": AdapterConfig(n_skills=3, n_splits=2, rank=2, policy="uniform"),
    "LoRA": AdapterConfig(n_skills=1, rank=2),
    "(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=1),
    "MHR-(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=4),
    "routing only": AdapterConfig(n_skills=3, n_splits=4, rank=2),
}
OPTIMIZERS = {
    "adafactor": OptimConfig(),
    "adafactor, scale_parameter": OptimConfig(scale_parameter=True, weight_decay=0.1),
    "adamw": OptimConfig(name="adamw"),
    "adamw, decay": OptimConfig(name="adamw", weight_decay=0.1, beta1=0.8, eps=1e-3),
}


def make_alone(kind, job: int, dtype=torch.float64, *, row_gradients=False) -> Adapter:
    """A job as an adapter of one task; jobs that train routing only share their inventory."""
    names = [f"job{job}"]
    alone = Adapter(CONFIGS[kind], SITES, task_names=names, row_gradients=row_gradients).to(dtype)
    is_frozen = kind == "routing only"
    randomise(alone, seed=0 if is_frozen else job)
    if is_frozen:
        alone.inventory.requires_grad_(False)
        alone.routing_logits.data.mul_(1.0 + job)
    return alone


@torch.no_grad()
def make_wave(alones) -> Adapter:
    """The wave of some jobs that have not begun."""
    first = alones[0]
    is_private = all(p.requires_grad for p in first.inventory.parameters())
    config = replace(first.config, private=is_private)
    names = [alone.task_names[0] for alone in alones]
    wave = Adapter(config, first.sites, task_names=names).to(next(first.parameters()).dtype)
    wave.inventory.requires_grad_(is_private)
    for name, parameter in wave.named_parameters():
        parts = [alone.get_parameter(name) for alone in alones]
        if name == "routing_logits":
            parameter.copy_(torch.cat(parts))
        else:
            parameter.copy_(torch.stack(parts, 1) if is_private else parts[0])
    return wave


def slices(wave: Adapter, job: int) -> dict[str, Tensor]:
    """A job's tensors in the shapes they have alone."""
    return {
        name: tensor[job : job + 1]
        if name == "routing_logits"
        else tensor[:, job]
        if wave.config.private
        else tensor
        for name, tensor in tensors_of(wave).items()
    }


def draw_gradients(alone: Adapter, job: int, step: int) -> dict[str, Tensor]:
    """A job's gradients in a step, above the clip norm in some steps and below it in others."""
    generator = torch.Generator().manual_seed(100 * job + step)
    found = {}
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            noise, size = (
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                for _ in range(2)
            )
            found[name] = (0.01 * 3.0 ** (step % 3 + job) * noise * size.exp()).to(parameter)
    return found


def draw_rates(n_jobs: int, step: int) -> dict[str, Tensor]:
    """Rates of jobs whose schedules differ; the first step is one of rate 0."""
    shares = torch.arange(1, n_jobs + 1, dtype=torch.float64)
    share = 0.0 if step == 0 else 1.0 - step / (STEPS + shares)
    return {"inventory": 0.01 * shares * share, "routing": 0.3 / shares * share}


def set_gradients(wave: Adapter, gradients: list[dict[str, Tensor]]) -> None:
    for name in gradients[0]:
        parts = [part[name] for part in gradients]
        is_routing = name == "routing_logits"
        wave.get_parameter(name).grad = torch.cat(parts) if is_routing else torch.stack(parts, 1)


def run_alone(alone, job, optim, *, clip_norm=CLIP_NORM, steps=range(STEPS), optimizer=None):
    """Train one job by itself; returns its gradient norms."""
    optimizer = optimizer or make_optimizer(alone, optim)
    norms = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = draw_rates(N_JOBS, step)[group["name"]][job].item()
        for name, gradient in draw_gradients(alone, job, step).items():
            parameter = alone.get_parameter(name)
            parameter.grad = gradient
            if name == "routing_logits" and alone.row_gradients:
                parameter.grad = gradient.to_sparse(1)
        norm = gradient_norm(alone.parameters())
        if clip_norm is not None:
            clip_gradients(alone.parameters(), norm, clip_norm)
        optimizer.step()
        norms.append(norm)
    return torch.stack(norms)


def run_wave(wave, optimizer, alones, jobs, steps, *, clip_norm=CLIP_NORM, spoil=None):
    """Train some jobs of a wave together; returns their gradient norms (steps, jobs)."""
    norms = []
    for step in steps:
        rates = draw_rates(N_JOBS, step)
        set_job_rates(optimizer, {name: rates_J[list(jobs)] for name, rates_J in rates.items()})
        gradients = [draw_gradients(alones[job], job, step) for job in jobs]
        if spoil is not None:
            spoil(step, gradients)
        set_gradients(wave, gradients)
        norms.append(clip_jobs(wave, clip_norm))
        optimizer.step()
    return torch.stack(norms)


def largest_difference(found, expected) -> float:
    """Largest difference of two jobs' tensors, relative to the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name in expected
    )


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def start(kind, optim, n_jobs=N_JOBS, dtype=torch.float64):
    """Jobs, their wave and its optimizer."""
    rows = has_row_gradients(optim)
    alones = [make_alone(kind, job, dtype, row_gradients=rows) for job in range(n_jobs)]
    wave = make_wave(alones)
    return alones, wave, make_job_optimizer(wave, optim)
