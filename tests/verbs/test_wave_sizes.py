"""What a job is said to take of a wave, against waves that run; and when nobody needs to know."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from measured_steps import wave_peak
from small_runs import BARE, LORA, make_config, write_rows

from mhr_scale.config import AdaptConfig, AdapterConfig, VariantConfig
from mhr_scale.jobs.adapt_inputs import AdaptInputs, open_jobs
from mhr_scale.jobs.scheduling import LARGEST, JobEstimate, wave_size
from mhr_scale.planning.steps import Shape
from mhr_scale.planning.wave_size import job_bytes

pytestmark = pytest.mark.slow

MHR = VariantConfig(fresh=AdapterConfig(rank=2, n_skills=4, n_splits=4))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> AdaptInputs:
    folder = tmp_path_factory.mktemp("waves")
    variants = {"LoRA": LORA, "MHR": MHR}
    return open_jobs(make_config(folder / "run", write_rows(folder), variants, backbone=BARE))


@pytest.fixture(scope="module")
def estimates(inputs: AdaptInputs) -> list[JobEstimate]:
    return [inputs.estimate(job, step=0) for job in inputs.jobs]


def counted(inputs: AdaptInputs, estimates: Sequence[JobEstimate], **changes: Any) -> float:
    changed = [replace(one, **changes) for one in estimates]
    return job_bytes(inputs, changed, on_gpu=False)


def test_the_variant_that_trains_most_is_counted(
    inputs: AdaptInputs, estimates: list[JobEstimate]
) -> None:
    of_mhr = [one for one in estimates if one.job.variant == "MHR"]
    of_lora = [one for one in estimates if one.job.variant == "LoRA"]
    whole = counted(inputs, estimates)
    assert whole == counted(inputs, of_mhr) > counted(inputs, of_lora)


@pytest.mark.parametrize("what", ["batch_size", "width", "depth"])
def test_the_largest_batch_of_any_job_is_counted(
    inputs: AdaptInputs, estimates: list[JobEstimate], what: str
) -> None:
    first, *rest = estimates
    larger = replace(first, **{what: 2 * getattr(first, what)})
    assert counted(inputs, [larger, *rest]) > 1.05 * counted(inputs, estimates)


def test_a_wave_of_three_takes_what_three_jobs_are_said_to_take(
    inputs: AdaptInputs, estimates: list[JobEstimate]
) -> None:
    """The profiler sees what a step adds; each job's own tensors lie there before."""
    one = estimates[0]
    config: AdaptConfig = replace(inputs.config, backbone=inputs.backbone.config)
    shape = Shape(rows=one.batch_size, width=one.width, depth=one.depth)
    real = wave_peak(config, "MHR", shape, n_jobs=3)
    said = 3 * job_bytes(inputs, estimates, on_gpu=False)
    assert real <= said <= 1.4 * real


def test_a_machine_with_room_takes_the_largest_wave(
    inputs: AdaptInputs, estimates: list[JobEstimate]
) -> None:
    needed = counted(inputs, estimates)
    assert wave_size(100 * LARGEST * needed, needed) == LARGEST
    assert wave_size(needed, needed) == 1
