"""Examples as rows of token ids: endings, cuts, dropped rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.config import BatchConfig
from mhr_scale.errors import DataError
from mhr_scale.families.t5 import GATED
from mhr_scale.rows.encode import Cuts, Encoder, check_rows_left
from mhr_scale.tasks.task import Example, Task

BYTES = ByT5Tokenizer()
EOS = BYTES.eos_token_id


def tokenise(tasks, tokenizer, config):
    """The rows of every task, and what was cut of all of them."""
    made = SimpleNamespace(train=[], validation=[], cuts=Cuts())
    for task in tasks:
        encoder = Encoder(task, tokenizer, config, GATED)
        made.train.append(encoder.rows(task.train))
        check_rows_left(task, made.train[-1], config)
        made.validation.append(encoder.rows(task.validation))
        made.cuts += encoder.cuts
    return made


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
    assert (words(row.input_ids), [words(ids) for ids in row.answers]) == ("abc$", ["yes$"])


def test_every_reference_is_kept():
    (row,) = train_rows(task(example("abc", "yes", "no", "")))
    assert [words(ids) for ids in row.answers] == ["yes$", "no$", "$"]


def test_inputs_alone_are_those_of_rows():
    made = task(example("abc=>"), example("abcdefghijkl=>"), suffix="=>")
    encoder = Encoder(made, BYTES, BatchConfig(max_input_tokens=8), GATED)
    assert [words(ids) for ids in encoder.inputs(made.train)] == ["abc=>$", "abcde=>$"]
    assert encoder.cuts == Cuts(rows=2, inputs=1)
    rows = [words(row.input_ids) for row in encoder.rows(made.train)]
    assert rows == ["abc=>$", "abcde=>$"]


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


def test_where_a_family_says_so_a_long_input_loses_its_beginning():
    family = SimpleNamespace(close=GATED.close, cut_side="left")
    made = task(example("abcdefghijkl=>"), suffix="=>")
    (row,) = Encoder(made, BYTES, BatchConfig(max_input_tokens=8), family).rows(made.train)
    assert words(row.input_ids) == "hijkl=>$"


@pytest.mark.parametrize(
    ("cut", "expected"),
    [("left", "hijkl=>$"), ("right", "abcde=>$"), ("middle", "abckl=>$"), (None, "abcde=>$")],
)
def test_a_recipe_says_where_a_long_input_is_cut(cut, expected):
    made = task(example("abcdefghijkl=>"), suffix="=>")
    (row,) = train_rows(made, max_input_tokens=8, cut=cut)
    assert words(row.input_ids) == expected
    (plain,) = train_rows(task(example("abcdefghijkl")), max_input_tokens=6, cut=cut)
    assert words(plain.input_ids) == {"left": "hijkl$", "middle": "abckl$"}.get(cut, "abcde$")


@pytest.mark.parametrize(
    ("target", "expected"),
    [("abc", "abc$"), ("abcd", "abc$"), ("abcdefgh", "abc$"), ("", "$")],
)
def test_a_long_target_loses_its_end_and_keeps_its_ending(target, expected):
    (row,) = train_rows(task(example("x", target)), max_target_tokens=4)
    assert [words(ids) for ids in row.answers] == [expected]


def test_a_target_of_one_token_is_an_ending():
    (row,) = train_rows(task(example("x", "abc")), max_target_tokens=1)
    assert words(row.answers[0]) == "$"


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
    assert (row.input_ids.dtype, row.answers[0].dtype) == (np.int32, np.int32)


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
