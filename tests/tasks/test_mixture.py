"""A mixture's plan as a whole: any range of its samples, its identity, and its errors."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixture_plans import make_plan, plans, properties

from mhr_scale.config import MixtureConfig
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.mixture import MixturePlan, Sample, Share

# Random access


@properties
@given(plans(), st.integers(0, 300), st.integers(0, 300))
def test_resuming_at_any_cursor_gives_the_same_tail(plan, start, count):
    whole = plan.samples(0, start + count)
    fresh = pickle.loads(pickle.dumps(plan))
    assert fresh.samples(start, start + count) == whole[start:]


@pytest.mark.parametrize("consumers", [1, 2, 4, 8])
def test_any_number_of_consumers_sees_the_same_stream(consumers):
    settings = {"cap": 20, "group": 4}
    whole = make_plan(37, 5, 80, **settings).samples(0, 480)
    plans = [make_plan(37, 5, 80, **settings) for _ in range(consumers)]
    each = 16 // consumers
    pieces = [
        plan.samples(at + each * rank, at + each * (rank + 1))
        for at in range(0, 480, 16)
        for rank, plan in enumerate(plans)
    ]
    assert [sample for piece in pieces for sample in piece] == whole


def test_asking_for_later_samples_first_changes_nothing():
    plan = make_plan(37, 5, 80, cap=20, group=3)
    starts = [900, 0, 450, 45, 900]
    found = [plan.samples(start, start + 30) for start in starts]
    whole = make_plan(37, 5, 80, cap=20, group=3).samples(0, 930)
    assert found == [whole[start : start + 30] for start in starts]


def test_an_empty_range_has_no_samples():
    assert make_plan(3).samples(4, 4) == []


def test_samples_hold_plain_integers():
    assert repr(make_plan(1).samples(0, 1)) == repr([Sample(number=0, task=0, row=0)])


def test_a_pickled_plan_leaves_its_blocks_behind():
    plan = make_plan(5000)
    before = len(pickle.dumps(plan))
    plan.samples(0, 10)
    assert len(pickle.dumps(plan)) == before


# Identity


def test_two_seeds_mix_the_tasks_in_two_ways():
    tasks = [[s.task for s in make_plan(40, 40, seed=seed).samples(0, 80)] for seed in (1, 2)]
    assert tasks[0] != tasks[1]


def test_two_seeds_mix_the_rows_of_a_task_in_two_ways():
    rows = [[s.row for s in make_plan(40, seed=seed).samples(0, 40)] for seed in (1, 2)]
    assert rows[0] != rows[1]


def test_equal_plans_have_equal_fingerprints():
    assert make_plan(5, 6, cap=3).fingerprint == make_plan(5, 6, cap=3).fingerprint


def test_a_whole_number_counts_the_same_as_integer_and_as_float():
    one, other = (make_plan(5, 6, weights={"a": weight}) for weight in (2, 2.0))
    assert one.fingerprint == other.fingerprint


def test_the_order_of_weights_does_not_count():
    one, other = (make_plan(5, 6, weights=w) for w in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"cap": 99},
        {"temperature": 1.5},
        {"weights": {"a": 1.0}},
        {"first_rows": True},
        {"group": 2},
        {"own": {"a": {"name": "z"}}},
        {"own": {"a": {"size": 6}}},
        {"own": {"a": {"cap": 99}}},
        {"own": {"a": {"weight": 1.0}}},
    ],
    ids=str,
)
def test_any_change_gives_another_fingerprint(change):
    assert make_plan(5, 6, **change).fingerprint != make_plan(5, 6).fingerprint


def test_the_order_of_tasks_counts():
    assert make_plan(5, 6, own={"a": {"name": "b"}, "b": {"name": "a"}}).fingerprint != (
        make_plan(5, 6).fingerprint
    )


# Errors


def test_a_weight_of_an_unknown_task_names_the_nearest_one():
    shares = [Share(name="rte_gpt_3", size=5), Share(name="wic", size=5)]
    config = MixtureConfig(weights={"rte_gpt3": 1.0})
    with pytest.raises(ConfigError, match=r"'rte_gpt3'; did you mean 'rte_gpt_3'\?"):
        MixturePlan(shares, config=config, seed=0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("giver", ["mixture", "task"])
def test_a_weight_must_be_a_number_above_zero(weight, giver):
    given = {"weights": {"b": weight}} if giver == "mixture" else {"own": {"b": {"weight": weight}}}
    with pytest.raises(ConfigError, match=f"task b: weight {weight} is not a number above 0"):
        make_plan(5, 5, **given)


def test_a_tasks_own_cap_must_be_at_least_one():
    with pytest.raises(ConfigError, match="task b: cap 0"):
        make_plan(5, 5, own={"b": {"cap": 0}})


def test_an_epoch_beyond_the_indices_is_refused():
    with pytest.raises(ConfigError, match="lower weights or caps"):
        make_plan(5, 5, weights={"b": 1e300})


def test_no_tasks_are_refused():
    with pytest.raises(DataError, match="at least one task"):
        make_plan()


def test_tasks_without_rows_are_named():
    with pytest.raises(DataError, match="b, d"):
        make_plan(5, 0, 5, 0)


def test_many_tasks_without_rows_are_counted():
    with pytest.raises(DataError, match=r"a, b, c, d, e, \.\.\. \(7 in all\)"):
        make_plan(*[0] * 7)


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(DataError, match="is called a;"):
        make_plan(5, 5, own={"b": {"name": "a"}})
