"""How often the tasks and rows of a mixture come: caps, shares and groups."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixture_plans import make_plan, plans, properties, rows_by_task, take_epochs

# Caps and passes


def test_caps_are_met_exactly():
    plan = make_plan(1000, 20, 300, cap=150)
    assert Counter(s.task for s in take_epochs(plan)) == {0: 150, 1: 20, 2: 150}


@pytest.mark.parametrize("own_cap", [40, 400])
def test_a_tasks_own_cap_is_stronger_than_the_mixtures(own_cap):
    assert make_plan(1000, 1000, cap=150, own={"b": {"cap": own_cap}}).quotas == (150, own_cap)


def test_three_epochs_of_cap_300_over_1000_rows_give_900_distinct_rows():
    plan = make_plan(1000, 50, cap=300)
    assert len(set(rows_by_task(take_epochs(plan, count=3))[0])) == 900


def test_first_rows_repeats_the_same_rows_in_every_epoch():
    plan = make_plan(1000, 50, cap=300, first_rows=True)
    epochs = [sorted(rows_by_task(take_epochs(plan, first=epoch))[0]) for epoch in range(3)]
    assert epochs == [list(range(300))] * 3


@properties
@given(plans())
def test_no_row_comes_twice_before_every_row_of_its_task_came_once(plan):
    sizes = [share.size for share in plan.shares]
    if plan.config.first_rows:
        caps = [share.cap or plan.config.cap or share.size for share in plan.shares]
        sizes = [min(size, cap) for size, cap in zip(sizes, caps)]
    for task, rows in rows_by_task(take_epochs(plan, count=4)).items():
        passes = [rows[at : at + sizes[task]] for at in range(0, len(rows), sizes[task])]
        assert all(sorted(rows) == list(range(sizes[task])) for rows in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])


@properties
@given(plans())
def test_every_epoch_meets_the_quotas(plan):
    for epoch in (0, 3):
        found = Counter(s.task for s in take_epochs(plan, first=epoch))
        assert found == dict(enumerate(plan.quotas))


@properties
@given(plans())
def test_quotas_are_positive_multiples_of_the_group(plan):
    assert all(quota > 0 and quota % plan.config.group == 0 for quota in plan.quotas)


# Shares


def test_temperature_flattens_shares():
    plain, warm, hot = (make_plan(900, 100, temperature=t).quotas for t in (1.0, 2.0, 1e6))
    assert [plain, warm, hot] == [(900, 100), (750, 250), (500, 500)]


def test_a_temperature_below_one_sharpens_shares():
    assert make_plan(900, 300, temperature=0.5).quotas == (1080, 120)


def test_temperature_comes_after_the_cap():
    assert make_plan(10_000, 100, cap=900, temperature=2.0).quotas == (750, 250)


def test_a_weight_is_relative_to_the_average_task():
    assert make_plan(100, 200, 300, weights={"a": 0.5}).quotas == (100, 200, 300)


def test_a_weight_leaves_the_shares_of_other_tasks_alone():
    assert make_plan(100, 200, 300, weights={"c": 1.0}).quotas == (100, 200, 200)


def test_weights_of_all_tasks_set_their_proportions():
    assert make_plan(10, 200, 390, weights={"a": 1, "b": 2, "c": 3}).quotas == (200, 400, 600)


def test_a_task_may_bring_its_own_weight():
    assert make_plan(100, 300, own={"a": {"weight": 2.0}}).quotas == (400, 300)


def test_the_mixtures_weight_is_stronger_than_the_tasks():
    plan = make_plan(100, 300, own={"a": {"weight": 2.0}}, weights={"a": 1.0})
    assert plan.quotas == (200, 300)


def test_the_largest_remainder_gets_the_missing_sample():
    assert make_plan(5, 4, 1, temperature=2.0).quotas == (4, 4, 2)


def test_a_tiny_share_still_gets_a_sample():
    assert make_plan(100, 100, weights={"b": 1e-9}).quotas == (100, 1)


# Groups


def test_a_group_gives_runs_of_one_task():
    plan = make_plan(41, 30, 7, group=4)
    tasks = [s.task for s in take_epochs(plan, count=3)]
    assert all(len(set(tasks[at : at + 4])) == 1 for at in range(0, len(tasks), 4))


def test_group_quotas_stay_nearest_to_the_shares():
    assert make_plan(41, 30, 7, 1, group=4).quotas == (40, 28, 8, 4)


@properties
@given(st.integers(2, 8), st.integers(0, 30), st.integers(0, 2**40))
def test_the_rows_of_a_run_differ_where_the_task_has_enough(group, more, seed):
    plan = make_plan(group + more, 50, group=group, seed=seed)
    rows = rows_by_task(take_epochs(plan, count=20))[0]
    assert all(len(set(rows[at : at + group])) == group for at in range(0, len(rows), group))
