"""Rows as batches: references drawn, micro batches cut, tokens packed."""

import multiprocessing
import random
import resource
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config

from mhr_scale.config import BatchConfig, MixtureConfig
from mhr_scale.errors import ConfigError
from mhr_scale.families.packed import IGNORE, EncodedRow
from mhr_scale.families.t5 import GATED
from mhr_scale.rows.batching import StepBatches, cut_batches, draw_rows, number_rows
from mhr_scale.tasks.mixture import MixturePlan, Sample, Share

# -- choosing -------------------------------------------------------------------------------------


def ids_of(*numbers):
    return np.array(numbers, dtype=np.int32)


MANY = [
    [EncodedRow(ids_of(5), (ids_of(6),)), EncodedRow(ids_of(7), (*map(ids_of, (8, 9, 10)),))],
    [EncodedRow(ids_of(11), (ids_of(12),))],
]


def targets_of(numbers, *, references, seed=0):
    samples = [Sample(number, 0, 1) for number in numbers]
    drawn = draw_rows(samples, MANY, references=references, seed=seed)
    return [target for _, _, _, (target,) in map(facts, drawn)]


def facts(row):
    """Number, task, input and the one target of a row."""
    (target,) = row.answers
    return row.number, row.task, row.input_ids.tolist(), target.tolist()


def test_a_drawn_row_is_the_row_of_its_sample():
    (made,) = draw_rows([Sample(4, 1, 0)], MANY, references="first", seed=0)
    assert facts(made) == (4, 1, [11], [12])


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
    (made,) = draw_rows([Sample(0, 0, 0)], MANY, references="random", seed=0)
    assert facts(made) == (0, 0, [5], [6])


def test_validation_takes_every_row_in_order_with_its_first_reference():
    assert [facts(row) for row in number_rows([[], *MANY])] == [
        (0, 1, [5], [6]),
        (1, 1, [7], [8]),
        (2, 2, [11], [12]),
    ]


# -- micro batches --------------------------------------------------------------------------------


def make_rows(shapes):
    """Rows from (task, input length, target length), numbered in order."""
    return [
        EncodedRow(ids_of(*[0] * n_input), (ids_of(*[0] * n_target),), task=task, number=number)
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
    chunks = numbers(cut_batches(make_rows(shapes), max_rows=size))
    assert sorted(chain(*chunks)) == list(range(len(shapes)))


@quickly
@given(shapes, sizes)
def test_micro_batches_are_full_but_for_the_last(shapes, size):
    lengths = [len(chunk) for chunk in cut_batches(make_rows(shapes), max_rows=size)]
    assert all(length == size for length in lengths[:-1])
    assert 1 <= lengths[-1] <= size


@quickly
@given(shapes, sizes)
def test_no_input_is_longer_than_one_of_an_earlier_micro_batch(shapes, size):
    chunks = cut_batches(make_rows(shapes), max_rows=size)
    for earlier, later in pairwise([[len(p.input_ids) for p in chunk] for chunk in chunks]):
        assert min(earlier) >= max(later)


@quickly
@given(shapes, sizes)
def test_rows_of_one_task_stand_side_by_side(shapes, size):
    for chunk in cut_batches(make_rows(shapes), max_rows=size):
        assert [p.task for p in chunk] == sorted(p.task for p in chunk)


@quickly
@given(shapes, sizes, st.integers())
def test_the_order_of_the_rows_does_not_matter(shapes, size, seed):
    rows = make_rows(shapes)
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert numbers(cut_batches(shuffled, max_rows=size)) == numbers(
        cut_batches(rows, max_rows=size)
    )


@quickly
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.randoms())
def test_ranks_together_run_the_micro_batches_of_one_rank(ranks, steps, size, random):
    shapes = [(0, random.randint(1, 9), 1) for _ in range(ranks * steps * size)]
    chunks = numbers(cut_batches(make_rows(shapes), max_rows=size))
    dealt = [chunks[rank::ranks] for rank in range(ranks)]
    assert [len(own) for own in dealt] == [steps] * ranks
    assert list(chain(*zip(*dealt, strict=True))) == chunks


# -- micro batches of rows laid flat --------------------------------------------------------------


def cut_flat(rows, size):
    return cut_batches(rows, max_rows=size, is_flat=True)


def token_counts(chunks):
    return [sum(len(p.input_ids) + p.n_answer_tokens for p in chunk) for chunk in chunks]


@quickly
@given(shapes, sizes)
def test_there_are_as_many_of_them_as_of_padded_rows_and_none_is_empty(shapes, size):
    chunks = cut_flat(make_rows(shapes), size)
    assert all(chunks)
    assert len(chunks) == -(-len(shapes) // size)
    assert sorted(chain(*numbers(chunks))) == list(range(len(shapes)))


@quickly
@given(shapes, sizes)
def test_none_has_more_than_its_share_and_a_row(shapes, size):
    counts = token_counts(cut_flat(make_rows(shapes), size))
    longest = max(n_input + n_target for _, n_input, n_target in shapes)
    assert max(counts) < sum(counts) / len(counts) + longest


@pytest.mark.parametrize(
    ("shapes", "size", "expected"),
    [
        # equal rows: as padded rows are cut
        ([(4, 1)] * 6, 2, [[5, 5], [5, 5], [5, 5]]),
        # a long row stands for many short ones
        ([(11, 1), *[(1, 1)] * 6], 4, [[12], [2] * 6]),
        # of two rows whose middle is the end of a share both ends are as near: it takes the row
        ([(3, 1)] * 3, 2, [[4, 4], [4]]),
        # what a row takes beyond its share, all others divide
        ([(79, 1), *[(9, 1)] * 7], 2, [[80], [10, 10], [10, 10, 10], [10, 10]]),
        # every batch has a row, however long those before are, or those behind
        ([(89, 1), (49, 1), (1, 1), (1, 1)], 1, [[90], [50], [2], [2]]),
        ([(5, 1), (5, 1), (4, 40)], 1, [[6], [6], [44]]),
    ],
)
def test_they_are_cut_where_a_share_of_the_tokens_ends(shapes, size, expected):
    chunks = cut_flat(make_rows([(0, *shape) for shape in shapes]), size)
    assert [token_counts([[p] for p in chunk]) for chunk in chunks] == expected


@quickly
@given(shapes, sizes, st.integers())
def test_they_are_the_same_for_any_order_and_sorted_by_length_then_by_task(shapes, size, seed):
    rows = make_rows(shapes)
    chunks = cut_flat(random.Random(seed).sample(rows, len(rows)), size)
    assert numbers(chunks) == numbers(cut_flat(rows, size))
    for earlier, later in pairwise([[len(p.input_ids) for p in chunk] for chunk in chunks]):
        assert min(earlier) >= max(later)
    for chunk in chunks:
        assert [(p.task, p.number) for p in chunk] == sorted((p.task, p.number) for p in chunk)


@quickly
@given(shapes, st.integers(1, 40))
def test_batches_by_tokens_count_no_padding(shapes, most):
    chunks = cut_batches(make_rows(shapes), max_tokens=most, is_flat=True)
    for chunk, count in zip(chunks, token_counts(chunks), strict=True):
        assert count <= most or len(chunk) == 1
    for chunk, later in pairwise(chunks):  # and each is full: no row behind it would have fitted
        longest = max(later, key=lambda p: (len(p.input_ids), p.n_answer_tokens))
        assert sum(token_counts([chunk, [longest]])) > most


# -- packing --------------------------------------------------------------------------------------


def pack(rows, *, pad_multiple=4, pad_id=0):
    config = T5Config(pad_token_id=pad_id, decoder_start_token_id=2)
    return GATED.pack(rows, config, pad_multiple=pad_multiple)


def packed_of(*pairs, **options):
    rows = [
        EncodedRow(ids_of(*inputs), (ids_of(*targets),), task=number % 2, number=10 + number)
        for number, (inputs, targets) in enumerate(pairs)
    ]
    return pack(rows, **options)


def input_ids(packed):
    return packed.inputs["input_ids"].tolist()


RAGGED = (((5, 6, 7, 8, 1), (9, 1)), ((5, 1), (9, 10, 1)))


def test_inputs_are_padded_to_a_multiple():
    assert input_ids(packed_of(*RAGGED)) == [[5, 6, 7, 8, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0, 0, 0]]


def test_the_mask_is_over_the_tokens():
    mask = packed_of(*RAGGED).inputs["attention_mask"]
    assert mask.tolist() == [[1] * 5 + [0] * 3, [1] * 2 + [0] * 6]


def test_a_padding_id_among_the_tokens_is_a_token():
    assert packed_of(((0, 0, 1), (1,))).inputs["attention_mask"].tolist() == [[1, 1, 1, 0]]


def test_labels_are_ignored_where_padded_and_no_wider_than_the_longest():
    assert packed_of(*RAGGED).labels_BD.tolist() == [[9, 1, IGNORE], [9, 10, 1]]


def test_the_decoder_reads_the_labels_behind_its_start_token():
    read = packed_of(*RAGGED).inputs["decoder_input_ids"]
    assert read.tolist() == [[2, 9, 0], [2, 9, 10]]


def test_the_ignored_label_is_that_of_torch():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE


def test_padding_is_the_backbones():
    assert input_ids(packed_of(((5, 1), (1,)), pad_id=3)) == [[5, 1, 3, 3]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (2, 6), (5, 5), (8, 8)])
def test_the_width_is_the_next_multiple_of_the_longest_input(multiple, width):
    packed = packed_of(*RAGGED, pad_multiple=multiple)
    assert packed.inputs["input_ids"].shape == (2, width)


def test_all_tensors_are_64_bit_integers():
    packed = packed_of(*RAGGED)
    tensors = (*packed.inputs.values(), packed.labels_BD, packed.choices_BD)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_packed_rows_know_their_tasks_and_sample_numbers():
    packed = packed_of(*RAGGED)
    assert (packed.tasks, numbers_of(packed)) == ((0, 1), (10, 11))


def test_packed_rows_count_their_tokens():
    packed = packed_of(*RAGGED)
    assert (packed.n_input_tokens, packed.n_target_tokens) == (7, 5)
    assert packed.n_positions == 2 * 8 + 2 * 3


# -- the stream of a run --------------------------------------------------------------------------


def numbers_of(packed):
    return tuple(row.number for row in packed.rows)


PACK = partial(pack, pad_multiple=8)


def stream(*, rank=0, world_size=1, workers=0, start=0, stop=5, pack=PACK, is_flat=False):
    """The sample numbers of each micro batch of each step, as one rank sees them."""
    sizes = [7, 12, 5]
    rows = [
        [
            EncodedRow(ids_of(*range(1 + (7 * row + task) % 9)), (ids_of(task, row),))
            for row in range(n)
        ]
        for task, n in enumerate(sizes)
    ]
    shares = [Share(name=f"t{task}", size=n) for task, n in enumerate(sizes)]
    batches = StepBatches(
        rows=rows,
        plan=MixturePlan(shares, config=MixtureConfig(), seed=3),
        config=BatchConfig(batch_size=16, micro_batch_size=2, workers=workers),
        references="first",
        seed=3,
        pack=pack,
        is_flat=is_flat,
        rank=rank,
        world_size=world_size,
    )
    return [[numbers_of(packed) for packed in step] for step in batches.load(start, stop)]


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_see_the_stream_of_one_rank(world_size, is_flat):
    ranks = [
        stream(rank=rank, world_size=world_size, is_flat=is_flat) for rank in range(world_size)
    ]
    together = [list(chain(*zip(*steps, strict=True))) for steps in zip(*ranks, strict=True)]
    assert together == stream(is_flat=is_flat)


def test_rows_laid_flat_are_those_of_the_same_steps():
    padded, flat = ([sorted(chain(*step)) for step in stream(is_flat=f)] for f in (False, True))
    assert flat == padded


def pack_without_shared_memory(batch):
    """What `pack` does; a worker may write no byte to a file after it, nor to shared memory."""
    if multiprocessing.parent_process() is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return pack(batch, pad_multiple=8)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.timeout(60)
def test_workers_need_no_shared_memory_for_their_batches():
    assert stream(workers=2, pack=pack_without_shared_memory) == stream()


@contextmanager
def no_room():
    """No file may be written to inside the block, nor shared memory."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_cannot_be_started_are_named():
    message = r"batch\.workers: 2 processes .*room in /dev/shm, or set batch\.workers: 0"
    with no_room(), pytest.raises(ConfigError, match=message):
        stream(workers=2)


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
