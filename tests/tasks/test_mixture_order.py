"""The order of a mixture's samples: in an epoch, a block and a pass, and against a plain loop."""

import json
import math
import tracemalloc
from collections import Counter
from hashlib import sha256
from itertools import count, islice, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_plans import make_plan, plans, rows_by_task, take_epochs

from mhr_scale.tasks import mixture
from mhr_scale.tasks.mixture import BLOCK, MixturePlan

# One epoch


@pytest.mark.parametrize("epoch", [0, 5])
def test_without_caps_an_epoch_has_every_row_exactly_once(epoch):
    plan = make_plan(3, 50, 1, 17)
    expected = {(task, row) for task, size in enumerate((3, 50, 1, 17)) for row in range(size)}
    assert sorted((s.task, s.row) for s in take_epochs(plan, first=epoch)) == sorted(expected)


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
