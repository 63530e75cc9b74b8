"""Which jobs share a wave, how many, and on which rank."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhr_scale.errors import ConfigError
from mhr_scale.jobs.job import Job, as_folder, check_folders
from mhr_scale.jobs.scheduling import (
    LARGEST,
    JobEstimate,
    PlannedWave,
    assign_waves,
    plan_waves,
    wave_size,
)

few = settings(max_examples=100, deadline=None)


def estimate(number: int, variant: str = "MHR", **changes) -> JobEstimate:
    one = JobEstimate(
        job=Job(task=f"task{number:02}", seed=0, variant=variant),
        step=0,
        steps=100,
        batch_size=8,
        width=64,
        depth=16,
    )
    return replace(one, **changes)


@st.composite
def estimates(draw) -> list[JobEstimate]:
    """Jobs of a few variants, shapes and saved steps, each job once."""
    keys = draw(
        st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab")), unique=True, max_size=20)
    )
    return [
        estimate(
            number,
            variant,
            step=draw(st.sampled_from([0, 50])),
            steps=100 if variant == "a" else 60,
            batch_size=draw(st.sampled_from([4, 8])),
            width=draw(st.sampled_from([32, 64])),
            depth=draw(st.sampled_from([8, 16])),
            scored_tokens=draw(st.integers(0, 10**5)),
        )
        for number, variant in keys
    ]


sizes = st.integers(1, 8)
ranks = st.integers(1, 5)


def kind(one: JobEstimate) -> tuple[object, ...]:
    return (one.job.variant, one.step, one.batch_size, one.width, one.depth)


# --- waves


@few
@given(estimates(), sizes, ranks)
def test_every_job_is_in_one_wave_of_one_rank(jobs, size, world_size):
    dealt = assign_waves(plan_waves(jobs, size=size, world_size=world_size), world_size)
    assert len(dealt) == world_size
    found = [one.job for waves in dealt for wave in waves for one in wave.jobs]
    assert sorted(found) == sorted(one.job for one in jobs)


@few
@given(estimates(), sizes, ranks)
def test_jobs_of_a_wave_share_variant_saved_step_and_batch_shape(jobs, size, world_size):
    for wave in plan_waves(jobs, size=size, world_size=world_size):
        assert len({kind(one) for one in wave.jobs}) == 1
        assert (wave.variant, wave.step) == kind(wave.jobs[0])[:2]


@few
@given(estimates(), sizes, ranks)
def test_waves_are_as_few_as_their_size_allows_and_no_larger_than_a_rank_s_share(
    jobs, size, world_size
):
    waves = plan_waves(jobs, size=size, world_size=world_size)
    largest = max(1, min(size, -(-len(jobs) // world_size)))
    for group in {kind(one) for one in jobs}:
        lengths = [len(wave.jobs) for wave in waves if kind(wave.jobs[0]) == group]
        n_waves = -(-sum(lengths) // largest)
        assert len(lengths) == n_waves
        assert max(lengths) == -(-sum(lengths) // n_waves)


@few
@given(estimates(), sizes, ranks, st.randoms())
def test_the_plan_depends_on_the_set_of_jobs_alone(jobs, size, world_size, shuffler):
    shuffled = shuffler.sample(jobs, len(jobs))
    plan, again = (plan_waves(o, size=size, world_size=world_size) for o in (jobs, shuffled))
    assert plan == again
    mixed = shuffler.sample(plan, len(plan))
    assert assign_waves(plan, world_size) == assign_waves(mixed, world_size)


@few
@given(estimates(), sizes, ranks)
def test_jobs_of_some_variants_can_be_kept_apart(jobs, size, world_size):
    waves = plan_waves(jobs, size=size, world_size=world_size, alone=["a"])
    others = plan_waves(
        [one for one in jobs if one.job.variant == "b"], size=size, world_size=world_size
    )
    assert all(len(wave.jobs) == 1 for wave in waves if wave.variant == "a")
    if not any(one.job.variant == "a" for one in jobs):
        assert waves == others


def test_waves_are_cut_evenly_rather_than_full():
    waves = plan_waves([estimate(n) for n in range(9)], size=8, world_size=1)
    assert [len(wave.jobs) for wave in waves] == [5, 4]


def test_waves_are_small_enough_to_go_round():
    jobs = [estimate(n) for n in range(8)]
    assert [len(wave.jobs) for wave in plan_waves(jobs, size=8, world_size=4)] == [2, 2, 2, 2]


def test_more_ranks_than_jobs_leave_some_without_any():
    dealt = assign_waves(plan_waves([estimate(n) for n in range(3)], size=8, world_size=5), 5)
    assert sorted(len(waves) for waves in dealt) == [0, 0, 1, 1, 1]


def test_no_job_makes_no_wave():
    assert plan_waves([], size=8, world_size=2) == []
    assert assign_waves([], 2) == [[], []]


def test_jobs_that_end_together_share_a_wave():
    jobs = [estimate(n, steps=300 if n % 2 else 100) for n in range(8)]
    waves = plan_waves(jobs, size=4, world_size=1)
    assert [{one.steps for one in wave.jobs} for wave in waves] == [{100}, {300}]


# --- ranks


@few
@given(estimates(), sizes, ranks)
def test_no_rank_has_more_to_do_than_its_share_and_part_of_a_wave(jobs, size, world_size):
    waves = plan_waves(jobs, size=size, world_size=world_size)
    loads = [sum(wave.cost for wave in mine) for mine in assign_waves(waves, world_size)]
    dearest = max((wave.cost for wave in waves), default=0.0)
    assert max(loads) <= sum(loads) / world_size + dearest * (1 - 1 / world_size) + 1e-6


def test_a_dear_wave_has_a_rank_to_itself_where_the_others_are_cheap():
    jobs = [estimate(0, steps=1000), *(estimate(n, steps=100) for n in range(1, 6))]
    waves = plan_waves(jobs, size=1, world_size=2)
    alone, rest = sorted(assign_waves(waves, 2), key=len)
    assert [one.job.task for wave in alone for one in wave.jobs] == ["task00"]
    assert len(rest) == 5


def test_what_a_job_has_done_costs_nothing_more():
    whole, half, scored = estimate(0), estimate(0, step=50), estimate(0, scored_tokens=10**4)
    assert half.cost == whole.cost / 2
    assert scored.cost == whole.cost + 10**4


# --- memory


@few
@given(st.floats(0, 1e12), st.floats(1, 1e12), st.floats(1, 10))
def test_a_wave_has_from_one_job_to_the_largest_number(free, dearest, factor):
    size = wave_size(free, dearest)
    assert 1 <= size <= LARGEST
    assert wave_size(free * factor, dearest) >= size >= wave_size(free, dearest * factor)
    assert size == 1 or Fraction(size) * Fraction(dearest) <= Fraction(free)


def test_some_of_the_free_memory_is_left_alone():
    assert wave_size(100.0, 10.0) == 8


# --- folders


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("copy.mirror.after", "copy.mirror.after"),
        ("super_glue/rte", "super_glue%2Frte"),
        ("MHR (16)", "MHR (16)"),
        ("..", "%2E%2E"),
        (" ", "%20"),
        ("mü:*?", "m%C3%BC%3A%2A%3F"),
        ("tasks.json", "tasks%2Ejson"),
        ("export.yaml", "export%2Eyaml"),
        ("a" * 200, "a" * 200),
    ],
)
def test_any_name_is_one_folder(text, folder, tmp_path):
    assert as_folder(text) == folder
    (tmp_path / "jobs" / folder).mkdir(parents=True)
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [folder]


@few
@given(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=2, unique=True))
@pytest.mark.parametrize("beginning", ["", "\u4efb" * 30, "a" * 300])
def test_other_names_are_other_folders(beginning, names):
    first, second = (as_folder(beginning + name) for name in names)
    assert first != second
    assert "/" not in first
    assert len(first) <= 200


def test_names_that_differ_in_case_alone_are_refused():
    check_folders(["qa", "QA2", "qa"], what="tasks")
    with pytest.raises(ConfigError, match="tasks 'qa' and 'QA' differ in case alone"):
        check_folders(["qa", "other", "QA"], what="tasks")


def test_a_wave_costs_what_its_jobs_cost():
    jobs = (estimate(0), estimate(1, scored_tokens=7))
    assert PlannedWave(jobs).cost == jobs[0].cost + jobs[1].cost


def test_the_order_of_equal_waves_is_that_of_their_jobs():
    waves = [PlannedWave((estimate(n),)) for n in range(6)]
    random.Random(0).shuffle(waves)
    dealt = assign_waves(waves, 3)
    assert [[wave.jobs[0].job.task for wave in mine] for mine in dealt] == [
        ["task00", "task03"],
        ["task01", "task04"],
        ["task02", "task05"],
    ]
