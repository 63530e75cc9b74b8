"""What a job takes of a card that it shares with others, and so how many form a wave."""

from collections.abc import Sequence

from mhr_scale.engine.engine import Engine
from mhr_scale.jobs.opened_jobs import Opening
from mhr_scale.jobs.scheduling import LARGEST, Outlook, plan_waves, wave_size
from mhr_scale.jobs.start import config_of, count_trained
from mhr_scale.planning.steps import Shape, at_depth, trace_wave


def gather_wave_size(opening: Opening, outlooks: Sequence[Outlook], engine: Engine) -> int:
    """Jobs per wave that the memory of this machine holds; the smallest number of all ranks.

    Collective. A step is counted only where some wave could have more than one job.
    """
    alone = opening.config.backbone_variants
    waves = plan_waves(outlooks, size=LARGEST, world_size=engine.world_size, alone=alone)
    if all(len(wave.jobs) == 1 for wave in waves):
        return 1
    able = [one for one in outlooks if one.job.variant not in alone]
    needed = job_bytes(opening, able, on_gpu=engine.device.type == "cuda")
    return min(engine.gather_objects(wave_size(engine.free_bytes(), needed)))


def job_bytes(opening: Opening, outlooks: Sequence[Outlook], *, on_gpu: bool) -> float:
    """Bytes of one job in a wave at its peak: its tensors and its rows' activations.

    One step of the program itself is counted, of a wave of one job: the variant that trains most,
    as many rows, as wide, as any job has. What jobs share is counted as if each had its own, so n
    jobs take n times this at most. Jobs of kind backbone share nothing and must not be among the
    outlooks.
    """
    trained = {name: _trained(opening, name) for name in {o.job.variant for o in outlooks}}
    dearest = max(sorted(trained), key=lambda name: trained[name])
    config, variant = opening.config, opening.config.variants[dearest]
    n_choices = 1
    if config.protocol.loss == "t_few":
        tasks = (data.few_shot.task for data in opening.data.values())
        n_choices = max(len(example.choices) for task in tasks for example in task.train)
    shape = Shape(
        rows=max(one.batch_size for one in outlooks),
        width=max(one.width for one in outlooks),
        depth=-(-max(one.depth for one in outlooks) // n_choices),
        n_choices=n_choices,
    )
    own = config_of(variant, opening.source(dearest))
    counts = at_depth(
        opening.blueprint,
        lambda shallow: trace_wave(
            config, variant, own, shallow, opening.backbone, shape, n_jobs=1, on_gpu=on_gpu
        ),
    )
    return counts.peak + 4.0 * trained[dearest]


def _trained(opening: Opening, name: str) -> int:
    variant = opening.config.variants[name]
    own = config_of(variant, opening.source(name))
    is_routing = variant.kind == "routing"
    return count_trained(own, opening.sites[name], routing_only=is_routing)
