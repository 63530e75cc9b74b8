"""Plans for the three kinds of recipes: pre-training, evaluation, few-shot adaptation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from mhr_scale.adapters import Adapter
from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.backbone.quantise import check_linears
from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    BackboneConfig,
    EvaluateConfig,
    PretrainConfig,
    WorkloadConfig,
)
from mhr_scale.engine.opened import lays_flat
from mhr_scale.errors import BackboneError, ConfigError
from mhr_scale.jobs.scheduling import LARGEST
from mhr_scale.jobs.start import count_trained
from mhr_scale.planning.cost import Case, Estimate, Passes, choose
from mhr_scale.planning.hardware import Machines
from mhr_scale.planning.lengths import Lengths, lengths_of, lengths_of_run
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
from mhr_scale.run.runlog import Progress

#: Tokens of the two short answers whose counts are extrapolated to longer ones.
SHORT, LONGER = 2, 4
RECOMPUTES = ("none", "reentrant")
#: A note on ranking where tasks' prompts share their beginnings.
SHARED = "what prompts of a task begin with alike is counted for each of them, and runs once"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimates for all placements, the one to use, and what they are based on."""

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
    blueprint, (tasks, source) = read_sizes(config.backbone), n_tasks(config, workload)
    is_flat = lays_flat(blueprint, config.backbone, batch.packing, "batch.packing")
    lengths = lengths_of_run(config, workload, is_flat=is_flat)
    width, depth = lengths.most
    shape = Shape(rows=1, width=width, depth=depth)

    def count(backbone: BackboneConfig, rows: int) -> Trace:
        settings = replace(config, backbone=backbone)

        def trace(sized: Shape) -> Trace:
            return at_depth(
                blueprint,
                lambda shallow: trace_pretraining(
                    settings,
                    shallow,
                    sized,
                    n_tasks=tasks,
                    accumulates=True,
                    on_gpu=machines.on_gpu,
                ),
            )

        return _of_lengths(trace, _of_rows(shape, rows, workload, most=tasks), lengths)

    trained = _count_numbers(blueprint, config.adapter, tasks)
    per_rank, few = batch.batch_size // machines.ranks, max(2, min(batch.micro_batch_size, 8))
    tokens = batch.batch_size * lengths.tokens
    estimates = []
    for case in _cases(blueprint, config.backbone, machines, count, few, trained, trains=True):
        sizes = [
            n for n in range(1, per_rank + 1) if per_rank % n == 0 and n <= max(1, case.largest)
        ]
        tried = [case.estimate(n, passes=per_rank // n, tokens=tokens) for n in sizes]
        best = min(tried, key=lambda estimate: estimate.step_seconds)
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
        what=f"{config.schedule.steps:,} steps of {batch.batch_size} rows of up to {width} + "
        f"{depth} tokens, {config.adapter.method}, {trained:,} trained numbers",
        rows_are="micro batch",
        estimates=tuple(estimates),
        chosen=choose(estimates, by=lambda estimate: estimate.step_seconds),
        notes=(f"{tasks} training tasks ({source})", *lengths.notes("batch.packing")),
    )


def plan_evaluation(config: EvaluateConfig, workload: WorkloadConfig, machines: Machines) -> Plan:
    """A plan for a recipe of `evaluate`: rows per batch, examples per second."""
    options = config.scoring
    frozen, settings = subject(config, workload)
    blueprint = read_sizes(frozen)
    generates = config.tasks.generates if options.metric is None else options.metric != "accuracy"
    shape = Shape(
        rows=1,
        width=workload.input_tokens or options.max_input_tokens,
        depth=options.max_new_tokens if generates else workload.choice_tokens,
        n_choices=1 if generates else workload.choices,
    )
    on_gpu = machines.on_gpu
    is_flat = not generates and lays_flat(blueprint, frozen, options.packing, "scoring.packing")
    behind = shape.n_choices * shape.depth
    own = replace(workload, mean_target_tokens=None)
    lengths = lengths_of(own, (shape.width, behind), is_flat=is_flat)
    is_shared = settings is None or not (settings.has_logits or settings.private)

    def count(backbone: BackboneConfig, rows: int) -> Trace:
        sized = _of_rows(shape, rows, workload, most=1 if is_shared else rows)

        def trace(shallow: Blueprint, new_tokens: int = 0) -> Trace:
            return trace_scoring(
                options, settings, shallow, backbone, sized, new_tokens=new_tokens, on_gpu=on_gpu
            )

        if not generates:
            return at_depth(blueprint, trace)
        short, longer = (
            at_depth(blueprint, lambda shallow, n=n: trace(shallow, n))  # type: ignore[misc]
            for n in (SHORT, LONGER)
        )
        share = (options.max_new_tokens - SHORT) / (LONGER - SHORT)
        return combine([(1.0 - share, short), (share, longer)])

    numbers = 0 if settings is None else _count_numbers(blueprint, settings, 1)
    estimates = []
    requested = max(1, options.max_tokens // shape.tokens)
    for case in _cases(blueprint, frozen, machines, count, 2, numbers, trains=False):
        rows = max(1, min(case.largest, requested))
        tokens = float(machines.ranks * replace(shape, rows=rows).tokens)
        estimate = case.estimate(rows, passes=1, tokens=tokens)
        extra = {
            # a batch of packed rows has so many tokens, whatever their lengths
            "examples_per_second": estimate.tokens_per_second
            / (lengths.tokens if is_flat else sum(lengths.most)),
            "scoring.max_tokens at most": case.largest * shape.tokens,
        }
        estimates.append(replace(estimate, extra=extra))
    answers = f"answers of {shape.depth} tokens" if generates else f"{shape.n_choices} choices"
    return Plan(
        kind="evaluate",
        machines=machines,
        what=f"rows of up to {shape.width} tokens, {answers}, scoring.max_tokens "
        f"{options.max_tokens}",
        rows_are="rows per batch",
        estimates=tuple(estimates),
        chosen=choose(estimates, by=lambda estimate: estimate.step_seconds / estimate.rows),
        notes=("the time of generation is that of answers as long as they may be",)
        if generates
        else (
            *lengths.notes("scoring.packing"),
            *((SHARED,) if is_flat and blueprint.family.shares_prompts else ()),
        ),
    )


def plan_adaptation(config: AdaptConfig, workload: WorkloadConfig, machines: Machines) -> Plan:
    """A plan for a recipe of `adapt`: jobs per wave, for the variant that trains most numbers."""
    frozen, settings_by_variant = variants(config, workload)
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
    is_flat = lays_flat(blueprint, frozen, config.waves.packing, "waves.packing")
    own = replace(workload, mean_target_tokens=None) if ranks_choices else workload
    lengths = lengths_of(own, (shape.width, shape.depth), is_flat=is_flat)
    sizes = {
        name: _trained(blueprint, settings, routing_only=config.variants[name].kind == "routing")
        for name, settings in settings_by_variant.items()
    }
    largest = max(sizes, key=lambda name: sizes[name])
    settings, variant = settings_by_variant[largest], config.variants[largest]

    def count(backbone: BackboneConfig, n_jobs: int) -> Trace:
        def trace(sized: Shape) -> Trace:
            return at_depth(
                blueprint,
                lambda shallow: trace_wave(
                    config,
                    variant,
                    settings,
                    shallow,
                    backbone,
                    sized,
                    n_jobs=n_jobs,
                    on_gpu=machines.on_gpu,
                ),
            )

        return _of_lengths(trace, shape, lengths)

    shared = _count_numbers(blueprint, settings, 1) if variant.kind == "routing" else 0
    estimates = []
    for case in _cases(blueprint, frozen, machines, count, 2, shared, trains=True, reduces=False):
        case = replace(case, job_bytes=4.0 * sizes[largest])
        jobs = max(1, min(case.largest, config.waves.size or LARGEST))
        tokens = float(machines.ranks * jobs * lengths.usual(shape).tokens)
        estimate = case.estimate(jobs, passes=1, tokens=tokens)
        seconds = estimate.step_seconds * (variant.steps or protocol.steps)
        extra = {"waves.size": jobs, "jobs_per_hour": machines.ranks * jobs * 3600.0 / seconds}
        estimates.append(replace(estimate, extra=extra))
    return Plan(
        kind="adapt",
        machines=machines,
        what=f"jobs of {protocol.steps} steps of {shape.rows} rows of up to {shape.width} tokens "
        f"and {shape.n_choices} x {shape.depth} behind; variant {largest}, which trains most "
        f"({sizes[largest]:,} numbers)",
        rows_are="jobs per wave",
        estimates=tuple(estimates),
        chosen=choose(estimates, by=lambda estimate: estimate.step_seconds / estimate.rows),
        notes=(
            "training passes; evaluations in between are not counted",
            *lengths.notes("waves.packing"),
        ),
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
    """Every placement with every kind of recomputation; equal counts are made once."""
    weights = weigh(blueprint)
    listed = list_placements(machines, frozen.dtype, stored=blueprint.quantise)
    if blueprint.quantise == "none":
        check_linears(frozen.quantise, blueprint, "backbone.quantise")
        placements = [place for place in listed if _can_hold(place, blueprint)]
    else:
        placements = listed
    if frozen.compile:
        placements = [place for place in placements if place.can_be_compiled]
    wanted = frozen.quantise if blueprint.quantise == "none" else blueprint.quantise
    recomputes = RECOMPUTES if trains else ("none",)
    n_traces = 2 * len({placement.dtype for placement in placements}) * len(recomputes)
    progress = Progress(n_traces, start=0, what="counting", unit="pass", every_seconds=5.0)

    @cache
    def passes(dtype: Any, recompute: Any) -> Passes:
        backbone = replace(frozen, dtype=dtype, recompute=recompute)
        traces = []
        for rows in (few, 2 * few):
            traces.append(count(backbone, rows))
            progress.advance(f"{dtype}, recomputation {recompute}")
        return Passes(few=few, many=2 * few, of_few=traces[0], of_many=traces[1])

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
            is_same_precision=(placement.dtype, placement.quantise) == (frozen.dtype, wanted),
        )

    cases = [case(placement, recompute) for placement in placements for recompute in recomputes]
    progress.close()
    return cases


def _can_hold(placement: Placement, blueprint: Blueprint) -> bool:
    """Whether the linears of whole weights can be quantised as a placement has them."""
    try:
        check_linears(placement.quantise, blueprint, "backbone.quantise")
    except BackboneError:
        return False
    return True


def _of_lengths(trace: Callable[[Shape], Trace], shape: Shape, lengths: Lengths) -> Trace:
    """The memory of rows as long as they may be, with the operations of rows as they are."""
    longest, usual = trace(shape), lengths.usual(shape)
    if usual == shape:
        return longest
    counted = trace(usual)
    return replace(longest, passes=counted.passes, update=counted.update)


def _of_rows(shape: Shape, rows: int, workload: WorkloadConfig, *, most: int) -> Shape:
    n_tasks = min(rows, workload.tasks_per_pass or rows, most)
    return replace(shape, rows=rows, n_tasks=n_tasks)


def _make_meta_adapter(blueprint: Blueprint, config: AdapterConfig, n_tasks: int) -> Adapter:
    """An adapter for the whole backbone, on the meta device."""
    with torch.device("meta"):
        return fresh(config, n_tasks)(make_model(blueprint))


def _count_numbers(blueprint: Blueprint, config: AdapterConfig, n_tasks: int) -> int:
    adapter = _make_meta_adapter(blueprint, config, n_tasks)
    return sum(parameter.numel() for parameter in adapter.parameters())


def _trained(blueprint: Blueprint, config: AdapterConfig, *, routing_only: bool) -> int:
    sites = _make_meta_adapter(blueprint, replace(config, private=False), 1).sites
    return count_trained(config, sites, routing_only=routing_only)


PLANNERS: dict[str, Callable[[Any, WorkloadConfig, Machines], Plan]] = {
    "pretrain": plan_pretraining,
    "evaluate": plan_evaluation,
    "adapt": plan_adaptation,
}
