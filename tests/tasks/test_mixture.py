import json
import math
import pickle
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace
from hashlib import sha256
from itertools import count, islice, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhr_scale.config import MixtureConfig
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks import mixture
from mhr_scale.tasks.mixture import BLOCK, MixturePlan, Sample, Share


def make_plan(*sizes, seed=7, own=None, **settings):
    """A plan over tasks a, b, c, ... of these sizes; `own` has fields of single shares by name."""
    shares = [Share(name="abcdefghijkl"[i], size=size) for i, size in enumerate(sizes)]
    shares = [replace(share, **(own or {}).get(share.name, {})) for share in shares]
    return MixturePlan(shares, config=MixtureConfig(**settings), seed=seed)


def take_epochs(plan, first=0, count=1):
    return plan.samples(first * plan.epoch_size, (first + count) * plan.epoch_size)


def rows_by_task(samples):
    rows = defaultdict(list)
    for sample in samples:
        rows[sample.task].append(sample.row)
    return dict(rows)


@st.composite
def plans(draw, first_rows=None):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    names = "abcdef"[: len(sizes)]
    amounts = st.floats(0.05, 4.0)
    return make_plan(
        *sizes,
        seed=draw(st.integers(0, 2**40)),
        cap=draw(st.none() | st.integers(1, 50)),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0, 10.0])),
        weights=draw(st.dictionaries(st.sampled_from(names), amounts)),
        first_rows=draw(st.booleans()) if first_rows is None else first_rows,
        group=draw(st.integers(1, 6)),
        own=draw(
            st.dictionaries(
                st.sampled_from(names),
                st.fixed_dictionaries({"cap": st.integers(1, 50), "weight": amounts}),
            )
        ),
    )


properties = settings(max_examples=60, deadline=None)


# One epoch


def test_without_caps_an_epoch_has_every_row_exactly_once():
    plan = make_plan(3, 50, 1, 17)
    expected = {(task, row) for task, size in enumerate((3, 50, 1, 17)) for row in range(size)}
    assert sorted((s.task, s.row) for s in take_epochs(plan)) == sorted(expected)


def test_a_later_epoch_has_every_row_exactly_once_too():
    plan = make_plan(3, 50, 1, 17)
    rows = rows_by_task(take_epochs(plan, first=5))
    assert [sorted(rows[task]) for task in range(4)] == [list(range(n)) for n in (3, 50, 1, 17)]


def test_an_epoch_mixes_its_tasks():
    tasks = [s.task for s in take_epochs(make_plan(500, 500))]
    assert all(200 < sum(tasks[at : at + 500]) < 300 for at in (0, 500))


def test_an_epoch_mixes_the_rows_of_a_task():
    rows = [s.row for s in take_epochs(make_plan(1000))]
    assert 400 < sum(rows[:500]) / 500 < 600


def test_two_epochs_have_different_orders():
    plan = make_plan(30, 30)
    tasks = [[s.task for s in take_epochs(plan, first=epoch)] for epoch in (0, 1)]
    assert tasks[0] != tasks[1]


def test_two_passes_have_different_orders():
    plan = make_plan(30)
    rows = [[s.row for s in take_epochs(plan, first=epoch)] for epoch in (0, 1)]
    assert rows[0] != rows[1]


def test_two_tasks_of_one_size_have_different_orders():
    rows = rows_by_task(take_epochs(make_plan(30, 30)))
    assert rows[0] != rows[1]


def test_the_order_of_a_tasks_rows_does_not_depend_on_the_other_tasks():
    rows = rows_by_task(take_epochs(make_plan(30, 12, 9)))
    assert rows[0] == rows_by_task(take_epochs(make_plan(30)))[0]


def test_samples_are_numbered_through_all_epochs():
    assert [s.number for s in make_plan(3, 4).samples(5, 40)] == list(range(5, 40))


# The stream, against a loop that takes one sample after the other


def word(key, number):
    word = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def key_of(*parts):
    return int.from_bytes(sha256(json.dumps(parts).encode()).digest()[:8], "little")


def permuted(place, size, key):
    base = 2 * math.ceil(math.sqrt(size) / 2)
    other = math.ceil(size / base)
    high, low = divmod(place, other)
    for number in range(0, 16, 2):
        high = (high + (word(key, low * 16 + number) >> 32)) % base
        low = (low + (word(key, high * 16 + number + 1) >> 32)) % other
    place = high * other + low
    return place if place < size else permuted(place, size, key)


def rows_of_a_task(size, group, key):
    """Its rows, pass after pass; rows that a draw already has move behind it."""
    order, n_rows = [], 0
    for number in count():
        changing = size >= 2 * group - 1
        ended = order[len(order) - n_rows % group :] if changing else []
        pass_key = word(key, number if changing else 0)
        order = [permuted(place, size, pass_key) for place in range(size)]
        order[:group] = sorted(order[:group], key=ended.__contains__)
        n_rows += size
        yield from order


def loop_over(plan, block_size):
    """Task and row of every sample; for plans without `first_rows`."""
    group = plan.config.group
    tasks = range(len(plan.shares))
    rows = [
        rows_of_a_task(share.size, group, key_of("rows", plan.seed, share.name))
        for share in plan.shares
    ]
    n_blocks = math.ceil(plan.epoch_size / block_size)
    phases = [word(key_of("phases", plan.seed), task) % n_blocks for task in tasks]
    drawn = [0 for _ in tasks]
    for block in count():
        draws = []
        for task in tasks:
            due = ((block + 1) * (plan.quotas[task] // group) + phases[task]) // n_blocks
            draws += [task] * (due - drawn[task])
            drawn[task] = due
        key = key_of("block", plan.seed, block)
        for place in sorted(range(len(draws)), key=lambda place: word(key, place)):
            for _ in range(group):
                yield draws[place], next(rows[draws[place]])


@settings(max_examples=40, deadline=None)
@given(plans(first_rows=False), st.sampled_from([1, 7, 20, BLOCK]))
def test_the_stream_is_that_of_a_loop(plan, block_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "BLOCK", block_size)
        plan = MixturePlan(plan.shares, config=plan.config, seed=plan.seed)
    found = [(s.task, s.row) for s in plan.samples(0, 250)]
    assert found == list(islice(loop_over(plan, block_size), 250))


def test_the_stream_of_format_2_stays_as_it_is():
    rows = "b0 b2 b1 a0 a4 a3 a1 a2 a4 a2 a1 a3 a0 a2 a3 b0 b2 b1"
    found = make_plan(5, 3, seed=0, group=3).samples(0, 18)
    assert " ".join(f"{'ab'[s.task]}{s.row}" for s in found) == rows


# Epochs of many blocks


def test_an_epoch_of_many_blocks_has_every_row_exactly_once():
    sizes = (2 * BLOCK + 17, BLOCK, 1, 700)
    rows = rows_by_task(take_epochs(make_plan(*sizes), first=1))
    assert [sorted(rows[task]) for task in range(4)] == [list(range(size)) for size in sizes]


def test_all_parts_of_an_epoch_of_many_blocks_have_all_tasks():
    plan = make_plan(3 * BLOCK, BLOCK)
    tasks = [s.task for s in take_epochs(plan)]
    each = len(tasks) // 16
    parts = [sum(tasks[at : at + each]) / each for at in range(0, len(tasks), each)]
    assert all(0.24 < part < 0.26 for part in parts)


def test_rare_tasks_come_anywhere_in_an_epoch():
    plan = make_plan(8 * BLOCK, *[1] * 11)
    places = [s.number / plan.epoch_size for s in take_epochs(plan) if s.task > 0]
    assert min(places) < 0.3 < 0.7 < max(places)


def test_ranges_may_cross_blocks():
    sizes = (BLOCK, BLOCK, 50)
    whole = make_plan(*sizes, group=3).samples(0, 2 * BLOCK + 3000)
    ranges = [(at, at + 2000) for at in (0, 43_000, 86_500, 2 * BLOCK - 1000)]
    found = [make_plan(*sizes, group=3).samples(start, stop) for start, stop in ranges]
    assert found == [whole[start:stop] for start, stop in ranges]


def test_samples_of_a_billion_rows_need_a_few_megabytes():
    tracemalloc.start()
    plan = make_plan(2**29, 2**29, 5)
    found = plan.samples(plan.epoch_size - 1000, plan.epoch_size + 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 2000
    assert peak < 32 * 2**20


# The orders of a pass


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_few_rows_come_equally_often(size):
    n_orders, each = math.factorial(size), 200
    plan = make_plan(size, weights={"a": each * n_orders})
    rows = [s.row for s in plan.samples(0, plan.epoch_size)]
    found = Counter(tuple(rows[at : at + size]) for at in range(0, len(rows), size))
    misfit = sum((found[order] - each) ** 2 / each for order in permutations(range(size)))
    assert misfit < n_orders + 4 * math.sqrt(2 * n_orders)


def test_every_row_comes_to_every_place():
    plan = make_plan(97, weights={"a": 1000})
    rows = [s.row for s in take_epochs(plan)]
    found = Counter((row, at % 97) for at, row in enumerate(rows))
    assert len(found) == 97 * 97
    assert max(found.values()) < 30


def test_neighbours_in_a_pass_have_nothing_to_do_with_each_other():
    rows = [s.row for s in take_epochs(make_plan(40_000))]
    pairs = Counter((one // 4000, other // 4000) for one, other in pairwise(rows))
    assert len(pairs) == 100
    assert all(300 < count < 500 for count in pairs.values())


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
def test_a_weight_must_be_a_number_above_zero(weight):
    with pytest.raises(ConfigError, match="task b: weight"):
        make_plan(5, 5, weights={"b": weight})


def test_a_tasks_own_weight_must_be_above_zero():
    with pytest.raises(ConfigError, match="task b: weight 0"):
        make_plan(5, 5, own={"b": {"weight": 0}})


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
