import random
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from mhr_scale.backbone import BUILTIN
from mhr_scale.batching import (
    Cuts,
    Pick,
    Row,
    Tokenised,
    collate,
    cut_micro_batches,
    pick,
    tokenise,
    validation_picks,
)
from mhr_scale.config import BatchConfig
from mhr_scale.errors import DataError
from mhr_scale.losses import IGNORE
from mhr_scale.tasks.mixture import Sample
from mhr_scale.tasks.task import Example, Task

BYTES = ByT5Tokenizer()
EOS = BYTES.eos_token_id


def example(text="abc", *targets):
    return Example(id="x", input=text, targets=targets or ("yes",))


def task(*examples, **fields):
    return Task(name="t", train=examples or (example(),), **fields)


def train_rows(task, **batch):
    return tokenise([task], BYTES, BatchConfig(**batch)).train[0]


def cuts_of(task, **batch):
    return tokenise([task], BYTES, BatchConfig(**batch)).cuts


def words(ids):
    """A row of bytes as text, its ending as a dollar."""
    return "".join("$" if token == EOS else chr(token - 3) for token in ids.tolist())


# -- tokenising and cutting -----------------------------------------------------------------------


def test_a_row_is_its_text_and_an_ending():
    (row,) = train_rows(task(example("abc", "yes")))
    assert (words(row.input_ids), [words(ids) for ids in row.targets]) == ("abc$", ["yes$"])


def test_every_reference_is_kept():
    (row,) = train_rows(task(example("abc", "yes", "no", "")))
    assert [words(ids) for ids in row.targets] == ["yes$", "no$", "$"]


def test_an_empty_input_is_an_ending():
    (row,) = train_rows(task(example("")))
    assert words(row.input_ids) == "$"


def test_rows_stay_in_the_order_of_tasks_and_examples():
    tasks = [
        Task(name="one", train=(example("a"), example("b")), validation=(example("c"),)),
        Task(name="two", train=(example("d"),), validation=(example("e"), example("f"))),
    ]
    made = tokenise(tasks, BYTES, BatchConfig())
    seen = [
        [[words(row.input_ids) for row in rows] for rows in fold]
        for fold in (made.train, made.validation)
    ]
    assert seen == [[["a$", "b$"], ["d$"]], [["c$"], ["e$", "f$"]]]


@pytest.mark.parametrize(
    ("text", "suffix", "limit", "expected"),
    [
        ("abcdefg", "", 8, "abcdefg$"),
        ("abcdefgh", "", 8, "abcdefg$"),
        ("abcdefghijkl", "", 8, "abcdefg$"),
        ("abcd=>", "=>", 8, "abcd=>$"),
        ("abcde=>", "=>", 8, "abcde=>$"),
        ("abcdef=>", "=>", 8, "abcde=>$"),
        ("abcdefghijkl=>", "=>", 8, "abcde=>$"),
        ("abcdef=>", "=>", 4, "a=>$"),
        ("=>=>=>=>", "=>", 6, "=>=" + "=>$"),
    ],
)
def test_a_long_input_loses_tokens_in_front_of_its_suffix(text, suffix, limit, expected):
    (row,) = train_rows(task(example(text), suffix=suffix), max_input_tokens=limit)
    assert words(row.input_ids) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [("abc", "abc$"), ("abcd", "abc$"), ("abcdefgh", "abc$"), ("", "$")],
)
def test_a_long_target_loses_its_end_and_keeps_its_ending(target, expected):
    (row,) = train_rows(task(example("x", target)), max_target_tokens=4)
    assert [words(ids) for ids in row.targets] == [expected]


def test_a_target_of_one_token_is_an_ending():
    (row,) = train_rows(task(example("x", "abc")), max_target_tokens=1)
    assert words(row.targets[0]) == "$"


@pytest.mark.parametrize("own", [5, 12])
def test_a_tasks_own_limit_is_stronger_than_the_batchs(own):
    (row,) = train_rows(task(example("a" * 20), max_input_tokens=own), max_input_tokens=8)
    assert len(row.input_ids) == own


def test_another_tokenizers_suffix_survives_a_cut():
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN["builtin:toy"])
    words = tokenizer.convert_ids_to_tokens(range(10, 20))
    suffix = " " + " ".join(words[8:])
    made = tokenise(
        [task(example(" ".join(words)), suffix=suffix)], tokenizer, BatchConfig(max_input_tokens=6)
    )
    assert tokenizer.convert_ids_to_tokens(made.train[0][0].input_ids.tolist()) == [
        *words[:3],
        *words[8:],
        tokenizer.eos_token,
    ]


def test_ids_take_four_bytes_each():
    (row,) = train_rows(task())
    assert (row.input_ids.dtype, row.targets[0].dtype) == (np.int32, np.int32)


LENGTHS = task(
    example("a" * 7, "b" * 3),
    example("a" * 8, "b" * 3),
    example("a" * 7, "b" * 4),
    example("a" * 9, "b" * 9, "b"),
    validation=(example("a" * 8), example("a")),
)


def test_cut_rows_are_counted():
    cuts = cuts_of(LENGTHS, max_input_tokens=8, max_target_tokens=4)
    assert cuts == Cuts(rows=6, inputs=3, targets=2, dropped=0)


def test_dropped_rows_are_counted_and_not_cut():
    cuts = cuts_of(LENGTHS, max_input_tokens=8, max_target_tokens=4, too_long="drop")
    assert cuts == Cuts(rows=6, inputs=0, targets=0, dropped=4)


def test_drop_leaves_the_rows_that_fit():
    made = tokenise(
        [LENGTHS], BYTES, BatchConfig(max_input_tokens=8, max_target_tokens=4, too_long="drop")
    )
    assert [len(fold[0]) for fold in (made.train, made.validation)] == [1, 1]


def test_one_long_reference_drops_the_row():
    long_second = task(example("a", "b", "b" * 9), example("a"))
    assert len(train_rows(long_second, max_target_tokens=4, too_long="drop")) == 1


def test_shares_are_of_all_rows():
    assert Cuts(rows=8, inputs=2, targets=1, dropped=3).facts() == {
        "cut_input_share": 0.25,
        "cut_target_share": 0.125,
        "dropped_rows": 3,
    }


def test_shares_of_no_rows_are_zero():
    assert Cuts().facts()["cut_input_share"] == 0.0


def test_a_task_without_a_row_that_fits_is_refused():
    with pytest.raises(DataError) as caught:
        train_rows(task(example("a" * 9)), max_input_tokens=8, too_long="drop")
    assert str(caught.value) == (
        "task t: every row is longer than 8 / 256 tokens and too_long is 'drop'; "
        "raise the limits or cut"
    )


def test_a_task_without_a_validation_row_that_fits_is_allowed():
    short = task(example("a"), validation=(example("a" * 9),))
    made = tokenise([short], BYTES, BatchConfig(max_input_tokens=8, too_long="drop"))
    assert made.validation == [[]]


def test_a_limit_below_the_suffix_is_refused():
    with pytest.raises(DataError) as caught:
        train_rows(task(suffix="Output:"), max_input_tokens=8)
    assert str(caught.value) == "task t: max_input_tokens 8 is below its suffix"


def test_a_limit_of_one_token_more_than_the_suffix_is_enough():
    (row,) = train_rows(task(example("abc Output:"), suffix="Output:"), max_input_tokens=9)
    assert words(row.input_ids) == "aOutput:$"


# -- choosing -------------------------------------------------------------------------------------


def ids_of(*numbers):
    return np.array(numbers, dtype=np.int32)


MANY = Tokenised(
    train=[
        [Row(ids_of(5), (ids_of(6),)), Row(ids_of(7), (ids_of(8), ids_of(9), ids_of(10)))],
        [Row(ids_of(11), (ids_of(12),))],
    ],
    validation=[[], [Row(ids_of(13), (ids_of(14), ids_of(15)))], [Row(ids_of(16), (ids_of(17),))]],
)


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
    picks = validation_picks(MANY)
    assert [(p.number, p.task, p.input_ids.tolist(), p.target_ids.tolist()) for p in picks] == [
        (0, 1, [13], [14]),
        (1, 2, [16], [17]),
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
    device = torch.device("cpu")
    return collate(picks, pad_id=pad_id, pad_multiple=pad_multiple, device=device)


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


def test_the_padding_share_is_of_inputs_and_labels():
    assert batch_of(*RAGGED).padding_share == pytest.approx(1 - 12 / (2 * 8 + 2 * 3))


def test_a_full_batch_has_no_padding():
    assert batch_of(((5, 6, 7, 1), (1,)), ((5, 6, 7, 1), (1,))).padding_share == 0.0
