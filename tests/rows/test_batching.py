"""Rows as batches: references drawn, micro batches cut, tokens padded."""

import random
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhr_scale.config import BatchConfig, MixtureConfig
from mhr_scale.passes.losses import IGNORE
from mhr_scale.rows.batching import Pick, StepBatches, collate, cut_micro_batches, number_rows, pick
from mhr_scale.rows.encode import Row
from mhr_scale.tasks.mixture import MixturePlan, Sample, Share

# -- choosing -------------------------------------------------------------------------------------


def ids_of(*numbers):
    return np.array(numbers, dtype=np.int32)


MANY = [
    [Row(ids_of(5), (ids_of(6),)), Row(ids_of(7), (ids_of(8), ids_of(9), ids_of(10)))],
    [Row(ids_of(11), (ids_of(12),))],
]


def targets_of(numbers, *, references, seed=0):
    samples = [Sample(number, 0, 1) for number in numbers]
    picks = pick(samples, MANY, references=references, seed=seed)
    return [p.target_ids.tolist()[0] for p in picks]


def test_a_pick_is_the_row_of_its_sample():
    (made,) = pick([Sample(4, 1, 0)], MANY, references="first", seed=0)
    assert (made.number, made.task, made.input_ids.tolist(), made.target_ids.tolist()) == (
        4,
        1,
        [11],
        [12],
    )


def test_the_first_reference_is_always_the_first():
    assert set(targets_of(range(50), references="first")) == {8}


def test_random_references_are_all_drawn():
    assert set(targets_of(range(50), references="random")) == {8, 9, 10}


def test_a_random_reference_follows_from_the_samples_number():
    together = targets_of(range(50), references="random")
    assert together == [targets_of([n], references="random")[0] for n in range(50)]


def test_a_random_reference_follows_from_the_seed():
    one, two = (targets_of(range(50), references="random", seed=seed) for seed in (0, 1))
    assert one != two


def test_a_single_reference_is_never_drawn():
    (made,) = pick([Sample(0, 0, 0)], MANY, references="random", seed=0)
    assert made.target_ids.tolist() == [6]


def test_validation_takes_every_row_in_order_with_its_first_reference():
    picks = number_rows([[], *MANY])
    assert [(p.number, p.task, p.input_ids.tolist(), p.target_ids.tolist()) for p in picks] == [
        (0, 1, [5], [6]),
        (1, 1, [7], [8]),
        (2, 2, [11], [12]),
    ]


# -- micro batches --------------------------------------------------------------------------------


def make_picks(shapes):
    """Picks from (task, input length, target length), numbered in order."""
    return [
        Pick(number, task, np.zeros(n_input, np.int32), np.zeros(n_target, np.int32))
        for number, (task, n_input, n_target) in enumerate(shapes)
    ]


shapes = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=24
)
sizes = st.integers(1, 5)
quickly = settings(max_examples=50, deadline=None)


def numbers(chunks):
    return [[p.number for p in chunk] for chunk in chunks]


@quickly
@given(shapes, sizes)
def test_every_row_is_in_one_micro_batch(shapes, size):
    chunks = numbers(cut_micro_batches(make_picks(shapes), size))
    assert sorted(chain(*chunks)) == list(range(len(shapes)))


@quickly
@given(shapes, sizes)
def test_micro_batches_are_full_but_for_the_last(shapes, size):
    lengths = [len(chunk) for chunk in cut_micro_batches(make_picks(shapes), size)]
    assert all(length == size for length in lengths[:-1])
    assert 1 <= lengths[-1] <= size


@quickly
@given(shapes, sizes)
def test_no_input_is_longer_than_one_of_an_earlier_micro_batch(shapes, size):
    chunks = cut_micro_batches(make_picks(shapes), size)
    for earlier, later in pairwise([[len(p.input_ids) for p in chunk] for chunk in chunks]):
        assert min(earlier) >= max(later)


@quickly
@given(shapes, sizes)
def test_rows_of_one_task_stand_side_by_side(shapes, size):
    for chunk in cut_micro_batches(make_picks(shapes), size):
        assert [p.task for p in chunk] == sorted(p.task for p in chunk)


@quickly
@given(shapes, sizes, st.integers())
def test_the_order_of_the_rows_does_not_matter(shapes, size, seed):
    picks = make_picks(shapes)
    shuffled = random.Random(seed).sample(picks, len(picks))
    assert numbers(cut_micro_batches(shuffled, size)) == numbers(cut_micro_batches(picks, size))


@quickly
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.randoms())
def test_ranks_together_run_the_micro_batches_of_one_rank(ranks, steps, size, random):
    shapes = [(0, random.randint(1, 9), 1) for _ in range(ranks * steps * size)]
    chunks = numbers(cut_micro_batches(make_picks(shapes), size))
    dealt = [chunks[rank::ranks] for rank in range(ranks)]
    assert [len(own) for own in dealt] == [steps] * ranks
    assert list(chain(*zip(*dealt, strict=True))) == chunks


# -- collating ------------------------------------------------------------------------------------


def batch_of(*pairs, pad_multiple=4, pad_id=0):
    picks = [
        Pick(10 + number, number % 2, ids_of(*inputs), ids_of(*targets))
        for number, (inputs, targets) in enumerate(pairs)
    ]
    return collate(picks, pad_id=pad_id, pad_multiple=pad_multiple)


RAGGED = (((5, 6, 7, 8, 1), (9, 1)), ((5, 1), (9, 10, 1)))


def test_inputs_are_padded_to_a_multiple():
    assert batch_of(*RAGGED).input_ids.tolist() == [
        [5, 6, 7, 8, 1, 0, 0, 0],
        [5, 1, 0, 0, 0, 0, 0, 0],
    ]


def test_the_mask_is_over_the_tokens():
    assert batch_of(*RAGGED).attention_mask.tolist() == [[1] * 5 + [0] * 3, [1] * 2 + [0] * 6]


def test_a_padding_id_among_the_tokens_is_a_token():
    assert batch_of(((0, 0, 1), (1,))).attention_mask.tolist() == [[1, 1, 1, 0]]


def test_labels_are_ignored_where_padded_and_no_wider_than_the_longest():
    assert batch_of(*RAGGED).labels.tolist() == [[9, 1, IGNORE], [9, 10, 1]]


def test_the_ignored_label_is_that_of_torch():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE


def test_padding_is_the_tokenizers():
    assert batch_of(((5, 1), (1,)), pad_id=3).input_ids.tolist() == [[5, 1, 3, 3]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (2, 6), (5, 5), (8, 8)])
def test_the_width_is_the_next_multiple_of_the_longest_input(multiple, width):
    assert batch_of(*RAGGED, pad_multiple=multiple).input_ids.shape == (2, width)


def test_all_tensors_are_64_bit_integers():
    batch = batch_of(*RAGGED)
    tensors = (batch.input_ids, batch.attention_mask, batch.labels)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_a_batch_knows_its_tasks_and_sample_numbers():
    batch = batch_of(*RAGGED)
    assert (batch.task_ids, batch.numbers) == ((0, 1), (10, 11))


def test_a_batch_counts_its_tokens():
    batch = batch_of(*RAGGED)
    assert (batch.n_tokens, batch.n_input_tokens) == (12, 7)


# -- the stream of a run --------------------------------------------------------------------------


def stream(*, rank=0, world_size=1, workers=0, start=0, stop=5):
    """The sample numbers of each micro batch of each step, as one rank sees them."""
    sizes = [7, 12, 5]
    rows = [
        [Row(ids_of(*range(1 + (7 * row + task) % 9)), (ids_of(task, row),)) for row in range(n)]
        for task, n in enumerate(sizes)
    ]
    shares = [Share(name=f"t{task}", size=n) for task, n in enumerate(sizes)]
    batches = StepBatches(
        rows=rows,
        plan=MixturePlan(shares, config=MixtureConfig(), seed=3),
        config=BatchConfig(batch_size=16, micro_batch_size=2, workers=workers),
        references="first",
        seed=3,
        pad_id=0,
        rank=rank,
        world_size=world_size,
    )
    return [[batch.numbers for batch in step] for step in batches.load(start, stop)]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_see_the_stream_of_one_rank(world_size):
    ranks = [stream(rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [list(chain(*zip(*steps, strict=True))) for steps in zip(*ranks, strict=True)]
    assert together == stream()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_do_not_change_the_stream(workers):
    assert stream(workers=workers) == stream()


@pytest.mark.parametrize("start", [1, 2, 3, 4])
def test_the_stream_goes_on_the_same_from_any_step(start):
    assert stream(start=start) == stream()[start:]


def test_every_sample_of_the_stream_comes_once():
    seen = list(chain.from_iterable(chain.from_iterable(stream())))
    assert sorted(seen) == list(range(5 * 16))
