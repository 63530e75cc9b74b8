"""The rows a job trains and is scored on, step by step."""

import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
from fast_tokenizers import TEMPLATE, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from small_jobs import make_config, make_data, make_examples, make_few_shot, make_task, tokenizer

from mhr_scale.config import JsonlTasks, SelectionConfig, ShotsConfig
from mhr_scale.errors import ConfigError
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.t5 import GATED
from mhr_scale.jobs.job_data import JobData, open_data, round_up
from mhr_scale.tasks.suites import read_few_shot
from mhr_scale.tasks.task import digest

CONFIG = make_config()


def opened(task, config=CONFIG, **options) -> JobData:
    return open_data(make_few_shot(task, **options), config, tokenizer(), GATED)


def text(ids) -> str:
    assert ids[-1] == tokenizer().eos_token_id
    return tokenizer().decode(ids[:-1])


def inputs(rows) -> list[str]:
    return [text(row.input_ids) for row in rows]


def epoch(data: JobData, number: int) -> list[str]:
    """Inputs of an epoch's batches, one after the other."""
    steps = range(number * data.steps_per_epoch, (number + 1) * data.steps_per_epoch)
    return [found for step in steps for found in inputs(data.batch(step))]


# --- epochs


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 14), st.integers(1, 16))
def test_an_epoch_has_every_row_once_but_for_a_remainder(n_rows, batch_size):
    data = make_data(make_config(batch_size=batch_size), "rows", n_rows)
    rows = Counter(example.input for example in data.few_shot.task.train)
    size = min(batch_size, n_rows)
    assert (data.batch_size, data.steps_per_epoch) == (size, n_rows // size)
    for number in range(3):
        found = epoch(data, number)
        assert len(found) == n_rows // size * size
        assert Counter(found) <= rows


def test_all_batches_of_a_job_have_the_same_number_of_rows():
    data = make_data(CONFIG, "rows", 11)
    assert [len(data.batch(step)) for step in range(9)] == [4] * 9


def test_what_an_epoch_leaves_out_is_in_others():
    data = make_data(CONFIG, "rows", 11)
    seen = {found for number in range(8) for found in epoch(data, number)}
    assert len(seen) == 11


def test_a_task_with_fewer_rows_than_a_batch_trains_on_all_of_them():
    data = make_data(CONFIG, "rows", 3)
    assert (data.batch_size, data.steps_per_epoch) == (3, 1)
    assert len(set(inputs(data.batch(17)))) == 3


def test_epochs_come_in_other_orders():
    data = make_data(CONFIG, "rows", 12)
    first, second = epoch(data, 0), epoch(data, 1)
    assert sorted(first) == sorted(second)
    assert first != second


def test_seeds_and_tasks_come_in_other_orders():
    rows = make_examples("rows", "train", 12)
    datas = [
        opened(replace(make_task(name), train=rows), seed=seed)
        for name, seed in (("one", 0), ("one", 1), ("two", 0))
    ]
    orders = [tuple(epoch(data, 0)) for data in datas]
    assert len(set(orders)) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_a_step_has_the_same_rows_whenever_it_is_asked_for():
    data, again = make_data(CONFIG, "rows", 10), make_data(CONFIG, "rows", 10)
    there = [inputs(data.batch(step)) for step in range(7)]
    back = [inputs(again.batch(step)) for step in reversed(range(7))]
    assert there == back[::-1]


def test_examples_that_change_from_epoch_to_epoch_are_drawn_for_each():
    task = make_task("rows", 8)
    few_shot = replace(
        make_few_shot(task), n_rows=4, draw=lambda number: task.train[number % 2 :: 2]
    )
    data = open_data(few_shot, CONFIG, tokenizer(), GATED)
    for number in range(4):
        drawn = [example.input for example in task.train[number % 2 :: 2]]
        assert sorted(epoch(data, number)) == sorted(drawn)


# --- rows


def by_input(data: JobData, steps: int = 4) -> dict[str, EncodedRow]:
    rows = [row for step in range(steps) for row in data.batch(step)]
    return {text(row.input_ids): row for row in rows}


def test_a_language_model_row_has_its_target_as_the_only_choice():
    data = make_data(CONFIG, "rows", 8)
    found = by_input(data)
    for example in data.few_shot.task.train:
        row = found[example.input]
        assert [text(choice) for choice in row.answers] == [example.targets[0]]
        assert row.label == 0


def test_a_t_few_row_has_all_choices_and_the_place_of_the_right_one():
    data = make_data(make_config(loss="t_few"), "rows", 8)
    found = by_input(data)
    for example in data.few_shot.task.train:
        row = found[example.input]
        assert [text(choice) for choice in row.answers] == list(example.choices)
        assert text(row.answers[row.label]) == example.targets[0]
        assert row.n_answer_tokens == sum(len(choice) for choice in row.answers)
    assert len({row.label for row in found.values()}) == 3


def test_long_texts_are_cut_and_closed():
    data = make_data(make_config(max_input_tokens=4, max_target_tokens=3), "rows", 8)
    for row in data.batch(0):
        assert (len(row.input_ids), len(row.answers[0])) == (4, 3)
        assert row.input_ids[-1] == row.answers[0][-1] == tokenizer().eos_token_id


# --- several references


def with_references(n_rows: int = 4, *, longest: int = 12):
    """A task whose rows have three references, the last of them the longest."""
    rows = [
        replace(row, targets=("a", "b c", " ".join("d" * longest)))
        for row in make_examples("rows", "train", n_rows)
    ]
    return make_task("rows", train=tuple(rows))


def targets(data: JobData, steps: int) -> list[list[str]]:
    return [[text(row.answers[0]) for row in data.batch(step)] for step in range(steps)]


def test_the_first_reference_is_the_target_of_every_epoch():
    assert targets(opened(with_references()), 5) == [["a"] * 4] * 5


def test_references_can_be_drawn_anew_for_each_epoch():
    config = make_config(references="random")
    found = targets(opened(with_references(), config), 30)
    assert len({tuple(batch) for batch in found}) > 10
    counts = Counter(target for batch in found for target in batch)
    assert len(counts) == 3
    assert min(counts.values()) > 20
    assert targets(opened(with_references(), config), 30) == found
    assert targets(opened(with_references(), config, seed=1), 30) != found


# --- the shape of batches


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000))
def test_lengths_are_rounded_up_a_little(length):
    rounded = round_up(length)
    assert rounded % 8 == 0
    assert length <= rounded <= max(8 + length, 1.25 * length)
    assert round_up(length + 1) >= rounded
    assert round_up(rounded) == rounded


def test_there_are_few_shapes():
    assert len({round_up(length) for length in range(1, 1025)}) < 40


def test_the_shape_is_that_of_the_longest_rows_rounded_up():
    assert make_data(CONFIG, "rows", 8).shape == (8, 8)
    assert make_data(make_config(loss="t_few"), "rows", 8).shape == (8, 24)


@pytest.mark.parametrize("protocol", [{}, {"loss": "t_few"}], ids=["language_model", "t_few"])
def test_the_shape_does_not_depend_on_the_step_or_the_batch_size(protocol):
    data = make_data(make_config(**protocol), "rows", 10)
    data.batch(5)
    other = make_data(make_config(batch_size=2, **protocol), "rows", 10)
    assert data.shape == other.shape


def test_the_shape_has_room_for_every_reference_that_may_be_drawn():
    """Whichever are drawn first: a batch that grows would round its sums in another way."""
    config = make_config(references="random")
    for seed in range(4):
        data = opened(with_references(n_rows=2), config, seed=seed)
        assert data.shape == (8, round_up(13))
    assert opened(with_references()).shape == (8, 8)


# --- what jobs are scored on


def on(what: str, **protocol):
    shots = ShotsConfig(set_aside=3)
    return replace(make_config(**protocol), selection=SelectionConfig(on=what), shots=shots)


def asked(scored) -> list[str]:
    return [question.example.id for question in scored.questions]


def test_a_job_is_scored_on_the_test_rows_of_its_task():
    data = make_data(CONFIG, "rows", 8)
    assert asked(data.test) == ["test:0", "test:1", "test:2"]
    assert [q.id for q in data.test.questions] == ["rows/test:0", "rows/test:1", "rows/test:2"]
    assert [q.example.input for q in data.test.questions] == inputs(data.test.rows)


@pytest.mark.parametrize("what", ["test", "last"])
def test_test_rows_and_no_selection_need_no_rows_of_their_own(what):
    assert opened(make_task("rows"), on(what)).selection is None


def test_validation_rows_select():
    task = make_task("rows", validation=make_examples("rows", "validation", 5))
    data = opened(task, on("validation"))
    assert asked(data.selection) == [f"validation:{n}" for n in range(5)]
    assert len(data.test.rows) == 3


def test_what_is_held_out_selects_where_there_is_any():
    task = make_task("rows", validation=make_examples("rows", "validation", 5))
    data = opened(task, on("held_out"))
    assert (data.selects_on, len(data.selection.rows)) == ("validation", 5)
    data = opened(make_task("rows"), on("held_out"))
    assert (data.selects_on, data.selection) == ("last", None)


def test_own_tasks_are_not_selected_on_the_reported_rows_by_default():
    config = make_config()
    own = JsonlTasks(suite="jsonl", folder="nowhere")
    found = [
        replace(config, tasks=tasks, selection=SelectionConfig()).selection.on
        for tasks in (config.tasks, own)
    ]
    assert found == ["test", "held_out"]


def test_a_task_without_validation_rows_cannot_select_on_them():
    with pytest.raises(ConfigError, match=r"selection\.on: validation, but task rows has no"):
        opened(make_task("rows"), on("validation"))


def test_shots_that_are_set_aside_select_and_no_epoch_draws_them():
    data = opened(make_task("rows"), on("shots"), set_aside=3)
    assert asked(data.selection) == [f"train:{n}" for n in (7, 8, 9)]
    aside = set(inputs(data.selection.rows))
    assert not aside & {found for number in range(5) for found in epoch(data, number)}


@pytest.mark.parametrize("choices", [(), ("only",), ("same", "same")])
def test_a_t_few_row_without_choices_to_rank_has_its_target_alone(choices, caplog):
    rows = list(make_examples("rows", "train", 6))
    rows[2] = replace(rows[2], choices=choices, label=None)
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        data = opened(make_task("rows", train=tuple(rows)), make_config(loss="t_few"))
    assert "rows: 1 of 6 training rows have no choices to rank" in caplog.text
    row = by_input(data)[rows[2].input]
    assert [text(choice) for choice in row.answers] == [rows[2].targets[0]]
    assert row.label == 0


def test_choices_of_the_same_text_are_one_choice_of_a_t_few_row():
    rows = list(make_examples("rows", "train", 6))
    right = rows[2].targets[0]
    rows[2] = replace(rows[2], choices=("a", right, "b", right, "a"), label=3)
    data = opened(make_task("rows", train=tuple(rows)), make_config(loss="t_few"))
    row = by_input(data)[rows[2].input]
    assert [text(choice) for choice in row.answers] == ["a", right, "b"]
    assert row.label == 1


# --- conversations


def test_conversations_are_shots_and_questions_in_their_template(tmp_path):
    """Two that end with the same question are two rows, of which each reads its own beginning."""

    def talk(first):
        turns = [("user", first), ("assistant", "A"), ("user", "why?"), ("assistant", first)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    (tmp_path / "t").mkdir()
    for fold, firsts in (("train", "bc"), ("test", "d")):
        rows = "".join(json.dumps(talk(first)) + "\n" for first in firsts)
        (tmp_path / "t" / f"{fold}.jsonl").write_text(rows)
    suite = JsonlTasks(suite="jsonl", folder=str(tmp_path), chat=True)
    (few_shot,), _ = read_few_shot(suite, ShotsConfig(), seed=0, examples=None)
    chats = make_tokenizer(chat_template=TEMPLATE)
    config = make_config(batch_size=2, max_input_tokens=99)
    config = replace(config, scoring=replace(config.scoring, max_input_tokens=99))
    data = open_data(few_shot, config, chats, CAUSAL)
    short = "<bos><user>{0}<eos>\n<assistant>"
    long = short + "A<eos>\n<user>why?<eos>\n<assistant>"
    assert [chats.decode(row.input_ids) for row in data.test.rows] == [
        short.format("d"),
        long.format("d"),
    ]
    seen = set()
    for step in range(20):
        for row in data.batch(step):
            seen.add((chats.decode(row.input_ids), chats.decode(row.answers[0])))
    assert seen == {
        pair
        for first in "bc"
        for pair in ((short.format(first), "A<eos>"), (long.format(first), f"{first}<eos>"))
    }
    one, two = (row for row in few_shot.task.train if row.history)
    assert digest([replace(one, history=two.history)]) != digest([one])
