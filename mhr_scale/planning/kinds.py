"""A plan for each kind of recipe: pre-training, evaluation, few-shot adaptation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mhr_scale.adapters import Adapter
from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    BackboneConfig,
    EvaluateConfig,
    PretrainConfig,
    WorkloadConfig,
)
from mhr_scale.errors import ConfigError
from mhr_scale.jobs.scheduling import LARGEST
from mhr_scale.jobs.start import count_trained
from mhr_scale.planning.cost import Case, Estimate, Passes, choose
from mhr_scale.planning.hardware import Machines
from mhr_scale.planning.placements import Placement, list_placements, load_of, weigh
from mhr_scale.planning.recipes import n_tasks, subject, variants
from mhr_scale.planning.sizes import read_sizes
from mhr_scale.planning.steps import (
    Shape,
    at_depth,
    fresh,
    trace_pretraining,
    trace_scoring,
    trace_wave,
)
from mhr_scale.planning.tracing import Trace, combine
from mhr_scale.recipe.reading import read_names

#: Tokens of the two short answers whose counts give those of a longer one.
SHORT, LONGER = 2, 4
RECOMPUTES = ("none", "reentrant")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimates of all placements, the one to use, and what they were made from."""

    kind: str
    machines: Machines
    what: str
    rows_are: str
    estimates: tuple[Estimate, ...]
    chosen: Estimate | None
    notes: tuple[str, ...]


def plan_pretraining(config: PretrainConfig, workload: WorkloadConfig, machines: Machines) -> Plan:
    """A plan for a recipe of `pretrain`: the micro batch, the step, the whole run."""
    batch = config.batch
    if batch.batch_size % machines.ranks:
        raise ConfigError(
            f"batch.batch_size: {batch.batch_size} rows do not divide over {machines.ranks} ranks "
            "(hardware.gpus); use a multiple of it, or fewer cards"
        )
    blueprint, (tasks, told) = read_sizes(config.backbone), n_tasks(config, workload)
    shape = Shape(
        rows=1,
        width=workload.input_tokens or batch.max_input_tokens,
        depth=workload.target_tokens or batch.max_target_tokens,
    )

    def count(frozen: BackboneConfig, rows: int) -> Trace:
        own = replace(config, backbone=frozen)
        at = _of_rows(shape, rows, workload, most=tasks)
        return at_depth(
            blueprint,
            lambda shallow: trace_pretraining(
                own, shallow, at, n_tasks=tasks, accumulates=True, on_gpu=machines.on_gpu
            ),
        )

    whole = _numbers(blueprint, config.adapter, tasks)
    per_rank, few = batch.batch_size // machines.ranks, max(2, min(batch.micro_batch_size, 8))
    tokens = float(batch.batch_size * (shape.width + shape.depth))
    estimates = []
    for case in _cases(blueprint, config.backbone, machines, count, few, whole, trains=True):
        micros = [
            n for n in range(1, per_rank + 1) if per_rank % n == 0 and n <= max(1, case.largest)
        ]
        tried = [case.estimate(n, passes=per_rank // n, tokens=tokens) for n in micros]
        best = min(tried, key=lambda one: one.step_seconds)
        hours = best.step_seconds * config.schedule.steps / 3600.0
        extra = {
            "micro_batch_size": best.rows,
            "hours": hours,
            "gpu_hours": hours * machines.ranks,
        }
        estimates.append(replace(best, extra=extra))
    return Plan(
        kind="pretrain",
        machines=machines,
        what=f"{config.schedule.steps:,} steps of {batch.batch_size} rows of {shape.width} + "
        f"{shape.depth} tokens, {config.adapter.method}, {whole:,} trained numbers",
        rows_are="micro batch",
        estimates=tuple(estimates),
        chosen=choose(estimates, by=lambda one: one.step_seconds),
        notes=(f"{tasks} training tasks ({told})",),
    )


def plan_evaluation(config: EvaluateConfig, workload: WorkloadConfig, machines: Machines) -> Plan:
    """A plan for a recipe of `evaluate`: rows per batch, examples a second."""
    options = config.scoring
    frozen, own = subject(config, workload)
    blueprint = read_sizes(frozen)
    generates = options.metric not in (None, "accuracy")
    shape = Shape(
        rows=1,
        width=workload.input_tokens or options.max_input_tokens,
        depth=options.max_new_tokens if generates else workload.choice_tokens,
        n_choices=1 if generates else workload.choices,
    )
    is_shared = own is None or not (own.has_logits or own.private)

    def count(now: BackboneConfig, rows: int) -> Trace:
        at = _of_rows(shape, rows, workload, most=1 if is_shared else rows)

        def once(shallow: Blueprint, new_tokens: int = 0) -> Trace:
            return trace_scoring(
                options, own, shallow, now, at, new_tokens=new_tokens, on_gpu=machines.on_gpu
            )

        if not generates:
            return at_depth(blueprint, once)
        short, longer = (
            at_depth(blueprint, lambda shallow, n=n: once(shallow, n))  # type: ignore[misc]
            for n in (SHORT, LONGER)
        )
        share = (options.max_new_tokens - SHORT) / (LONGER - SHORT)
        return combine([(1.0 - share, short), (share, longer)])

    numbers = 0 if own is None else _numbers(blueprint, own, 1)
    estimates = []
    asked = max(1, options.max_tokens // shape.tokens)
    for case in _cases(blueprint, frozen, machines, count, 2, numbers, trains=False):
        rows = max(1, min(case.largest, asked))
        tokens = float(machines.ranks * replace(shape, rows=rows).tokens)
        one = case.estimate(rows, passes=1, tokens=tokens)
        extra = {
            "examples_per_second": machines.ranks * rows / one.step_seconds,
            "scoring.max_tokens at most": case.largest * shape.tokens,
        }
        estimates.append(replace(one, extra=extra))
    answers = f"answers of {shape.depth} tokens" if generates else f"{shape.n_choices} choices"
    return Plan(
        kind="evaluate",
        machines=machines,
        what=f"rows of {shape.width} tokens, {answers}, scoring.max_tokens {options.max_tokens}",
        rows_are="rows per batch",
        estimates=tuple(estimates),
        chosen=choose(estimates, by=lambda one: one.step_seconds / one.rows),
        notes=("the time of generation is that of answers as long as they may be",)
        if generates
        else (),
    )


def plan_adaptation(config: AdaptConfig, workload: WorkloadConfig, machines: Machines) -> Plan:
    """A plan for a recipe of `adapt`: jobs per wave, for its dearest variant."""
    frozen, settings = variants(config, workload)
    blueprint, protocol = read_sizes(frozen), config.protocol
    ranks_choices = protocol.loss == "t_few"
    shape = Shape(
        rows=protocol.batch_size,
        width=workload.input_tokens or protocol.max_input_tokens,
        depth=workload.choice_tokens
        if ranks_choices
        else workload.target_tokens or protocol.max_target_tokens,
        n_choices=workload.choices if ranks_choices else 1,
    )
    sizes = {
        name: _trained(blueprint, own, routing_only=config.variants[name].kind == "routing")
        for name, own in settings.items()
    }
    dearest = max(sizes, key=lambda name: sizes[name])
    own, variant = settings[dearest], config.variants[dearest]

    def count(now: BackboneConfig, n_jobs: int) -> Trace:
        return at_depth(
            blueprint,
            lambda shallow: trace_wave(
                config,
                variant,
                own,
                shallow,
                now,
                shape,
                n_jobs=n_jobs,
                on_gpu=machines.on_gpu,
            ),
        )

    shared = _numbers(blueprint, own, 1) if variant.kind == "routing" else 0
    estimates = []
    for case in _cases(blueprint, frozen, machines, count, 2, shared, trains=True, reduces=False):
        case = replace(case, job_bytes=4.0 * sizes[dearest])
        jobs = max(1, min(case.largest, config.waves.size or LARGEST))
        tokens = float(machines.ranks * jobs * shape.tokens)
        one = case.estimate(jobs, passes=1, tokens=tokens)
        seconds = one.step_seconds * (variant.steps or protocol.steps)
        extra = {"waves.size": jobs, "jobs_per_hour": machines.ranks * jobs * 3600.0 / seconds}
        estimates.append(replace(one, extra=extra))
    return Plan(
        kind="adapt",
        machines=machines,
        what=f"jobs of {protocol.steps} steps of {shape.rows} rows of {shape.width} tokens and "
        f"{shape.n_choices} x {shape.depth} behind; variant {dearest}, which trains most "
        f"({sizes[dearest]:,} numbers)",
        rows_are="jobs per wave",
        estimates=tuple(estimates),
        chosen=choose(estimates, by=lambda one: one.step_seconds / one.rows),
        notes=("training passes; evaluations in between are not counted",),
    )


# -- parts -----------------------------------------------------------------------------------------


def _cases(
    blueprint: Blueprint,
    frozen: BackboneConfig,
    machines: Machines,
    count: Callable[[BackboneConfig, int], Trace],
    few: int,
    numbers: int,
    *,
    trains: bool,
    reduces: bool = True,
) -> list[Case]:
    """Every placement under every kind of recomputation; counts are shared where they agree."""
    weights = weigh(blueprint)

    @cache
    def passes(dtype: Any, recompute: Any) -> Passes:
        now = replace(frozen, dtype=dtype, recompute=recompute)
        return Passes(few=few, many=2 * few, of_few=count(now, few), of_many=count(now, 2 * few))

    def case(placement: Placement, recompute: str) -> Case:
        return Case(
            placement=placement,
            recompute=recompute,
            load=load_of(placement, weights, machines),
            machines=machines,
            counts=passes(placement.dtype, recompute),
            adapter_bytes=4.0 * numbers,
            trains=trains,
            reduces=trains and reduces and machines.ranks > 1,
            is_same_precision=(placement.dtype, placement.quantise)
            == (frozen.dtype, frozen.quantise),
        )

    return [
        case(placement, recompute)
        for placement in list_placements(machines, frozen.dtype)
        for recompute in (RECOMPUTES if trains else ("none",))
    ]


def _of_rows(shape: Shape, rows: int, workload: WorkloadConfig, *, most: int) -> Shape:
    n_tasks = min(rows, workload.tasks_per_pass or rows, most)
    return replace(shape, rows=rows, n_tasks=n_tasks)


def _drawn(blueprint: Blueprint, config: AdapterConfig, n_tasks: int) -> Adapter:
    """The adapter of some settings for the whole backbone, on the meta device."""
    with torch.device("meta"):
        return fresh(config, n_tasks)(make_model(blueprint))


def _numbers(blueprint: Blueprint, config: AdapterConfig, n_tasks: int) -> int:
    return sum(parameter.numel() for parameter in _drawn(blueprint, config, n_tasks).parameters())


def _trained(blueprint: Blueprint, config: AdapterConfig, *, routing_only: bool) -> int:
    sites = _drawn(blueprint, replace(config, private=False), 1).sites
    return count_trained(config, sites, routing_only=routing_only)


PLANNERS: dict[str, tuple[Any, Callable[[Any, WorkloadConfig, Machines], Plan]]] = {
    "pretrain": (PretrainConfig, plan_pretraining),
    "evaluate": (EvaluateConfig, plan_evaluation),
    "adapt": (AdaptConfig, plan_adaptation),
}


def recognise(recipe: Path | str) -> str:
    """Which verb a recipe is for, by its parts; raises `ConfigError` if for none of ours."""
    names = read_names(recipe)
    if "variants" in names:
        return "adapt"
    if "schedule" in names and "adapter" in names:
        return "pretrain"
    if "tasks" in names and ("adapter" in names or "backbone" in names) and "task" not in names:
        return "evaluate"
    raise ConfigError(
        f"{recipe}: sets {', '.join(names) or 'nothing'}; plan reads recipes of pretrain, evaluate "
        "and adapt"
    )
