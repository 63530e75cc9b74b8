"""Memory of one few-shot job, and the number of jobs per wave that follows from it."""

from collections.abc import Sequence

from mhr_scale.engine.engine import Engine
from mhr_scale.jobs.adapt_inputs import AdaptInputs
from mhr_scale.jobs.scheduling import LARGEST, JobEstimate, plan_waves, wave_size
from mhr_scale.jobs.start import config_of, count_trained
from mhr_scale.planning.steps import Shape, at_depth, trace_wave


def gather_wave_size(inputs: AdaptInputs, estimates: Sequence[JobEstimate], engine: Engine) -> int:
    """Jobs per wave that the memory of this machine holds; the smallest number of all ranks.

    Collective. Nothing is counted if no wave could have more than one job.
    """
    alone = inputs.config.backbone_variants
    waves = plan_waves(estimates, size=LARGEST, world_size=engine.world_size, alone=alone)
    if all(len(wave.jobs) == 1 for wave in waves):
        return 1
    sharing = [estimate for estimate in estimates if estimate.job.variant not in alone]
    needed = job_bytes(inputs, sharing, on_gpu=engine.device.type == "cuda")
    return min(engine.gather_objects(wave_size(engine.free_bytes(), needed)))


def job_bytes(inputs: AdaptInputs, estimates: Sequence[JobEstimate], *, on_gpu: bool) -> float:
    """Bytes of one job in a wave at its peak: its tensors and its rows' activations.

    Counted on one step of the program itself, of a wave of one job: the variant that trains most,
    with the most and longest rows of any job. Shared memory is counted for every job, so n jobs
    take at most n times this. Jobs of kind backbone have waves of their own and must not be among
    the estimates.
    """
    trained = {name: _trained(inputs, name) for name in {job.job.variant for job in estimates}}
    largest = max(sorted(trained), key=lambda name: trained[name])
    config, variant = inputs.config, inputs.config.variants[largest]
    n_choices = 1
    if config.protocol.loss == "t_few":
        tasks = (data.few_shot.task for data in inputs.data.values())
        n_choices = max(len(example.choices) or 1 for task in tasks for example in task.train)
    shape = Shape(
        rows=max(job.batch_size for job in estimates),
        width=max(job.width for job in estimates),
        depth=-(-max(job.depth for job in estimates) // n_choices),
        n_choices=n_choices,
    )
    settings = config_of(variant, inputs.source(largest))
    counts = at_depth(
        inputs.backbone.blueprint,
        lambda shallow: trace_wave(
            config,
            variant,
            settings,
            shallow,
            inputs.backbone.config,
            shape,
            n_jobs=1,
            on_gpu=on_gpu,
        ),
    )
    return counts.peak + 4.0 * trained[largest]


def _trained(inputs: AdaptInputs, name: str) -> int:
    variant = inputs.config.variants[name]
    settings = config_of(variant, inputs.source(name))
    is_routing = variant.kind == "routing"
    return count_trained(settings, inputs.sites[name], routing_only=is_routing)
