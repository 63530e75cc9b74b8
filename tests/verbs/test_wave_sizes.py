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
def opening(tmp_path_factory: pytest.TempPathFactory) -> AdaptInputs:
    folder = tmp_path_factory.mktemp("waves")
    variants = {"LoRA": LORA, "MHR": MHR}
    return open_jobs(make_config(folder / "run", write_rows(folder), variants, backbone=BARE))


@pytest.fixture(scope="module")
def outlooks(opening: AdaptInputs) -> list[JobEstimate]:
    return [opening.outlook(job, step=0) for job in opening.jobs]


def counted(opening: AdaptInputs, outlooks: Sequence[JobEstimate], **changes: Any) -> float:
    changed = [replace(one, **changes) for one in outlooks]
    return job_bytes(opening, changed, on_gpu=False)


def test_the_variant_that_trains_most_is_counted(
    opening: AdaptInputs, outlooks: list[JobEstimate]
) -> None:
    of_mhr = [one for one in outlooks if one.job.variant == "MHR"]
    of_lora = [one for one in outlooks if one.job.variant == "LoRA"]
    whole = counted(opening, outlooks)
    assert whole == counted(opening, of_mhr) > counted(opening, of_lora)


@pytest.mark.parametrize("what", ["batch_size", "width", "depth"])
def test_the_largest_batch_of_any_job_is_counted(
    opening: AdaptInputs, outlooks: list[JobEstimate], what: str
) -> None:
    first, *rest = outlooks
    larger = replace(first, **{what: 2 * getattr(first, what)})
    assert counted(opening, [larger, *rest]) > 1.05 * counted(opening, outlooks)


def test_a_wave_of_three_takes_what_three_jobs_are_said_to_take(
    opening: AdaptInputs, outlooks: list[JobEstimate]
) -> None:
    """The profiler sees what a step adds; each job's own tensors lie there before."""
    one = outlooks[0]
    config: AdaptConfig = replace(opening.config, backbone=opening.backbone)
    shape = Shape(rows=one.batch_size, width=one.width, depth=one.depth)
    real = wave_peak(config, "MHR", shape, n_jobs=3)
    said = 3 * job_bytes(opening, outlooks, on_gpu=False)
    assert real <= said <= 1.4 * real


def test_a_machine_with_room_takes_the_largest_wave(
    opening: AdaptInputs, outlooks: list[JobEstimate]
) -> None:
    needed = counted(opening, outlooks)
    assert wave_size(100 * LARGEST * needed, needed) == LARGEST
    assert wave_size(needed, needed) == 1
