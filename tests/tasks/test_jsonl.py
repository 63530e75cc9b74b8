"""Tasks of JSONL files: which task a row belongs to, and rows that cannot be used."""

import json
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhr_scale.config import IntakeConfig, JsonlTasks
from mhr_scale.errors import DataError
from mhr_scale.tasks.json_lines import iter_rows
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.tasks.task import Intake

GOOD = b'{"input": "x", "target": "y"}'


def write(path, *lines):
    """Write rows (dicts) or raw lines (bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")


def rows(count, **fields):
    return [{"input": f"x{n}", "target": f"y{n}", **fields} for n in range(count)]


def read(folder, into=None, **options):
    return JsonlTasks(suite="jsonl", folder=str(folder), **options).read_tasks(into or Intake())


def read_one(folder, **options):
    (task,) = read(folder, **options)
    return task


def reason(folder, line, *, fold="train", policy=None):
    """Why a line is refused that stands third in a file with good rows."""
    write(folder / "t" / "train.jsonl", GOOD)
    write(folder / "t" / f"{fold}.jsonl", GOOD, b"", line, GOOD)
    intake = Intake()
    read(folder, intake, intake=policy or IntakeConfig())
    (reject,) = intake.rejects
    assert (reject.place.line, reject.task) == (3, "t")
    return reject.reason


def full_row(**fields):
    return {"input": "x", "target": "b", "choices": ["a", "b"], "label": 1, **fields}


# What is read


def test_a_row_may_name_another_task_than_its_folder(tmp_path):
    write(tmp_path / "t" / "train.jsonl", *rows(1, task="a"), *rows(1, task="b"))
    assert [task.name for task in read(tmp_path)] == ["a", "b"]


def test_one_file_holds_many_tasks_by_their_field(tmp_path):
    write(tmp_path / "train.jsonl", *rows(2, task="b"), *rows(1, task="a"))
    assert [(task.name, len(task.train)) for task in read(tmp_path)] == [("a", 1), ("b", 2)]


def test_a_fold_may_be_a_folder_of_files(tmp_path):
    write(tmp_path / "train" / "some.jsonl", *rows(2, task="a"))
    write(tmp_path / "dev" / "some.jsonl", *rows(1, task="a"))
    task = read_one(tmp_path)
    assert (len(task.train), len(task.validation)) == (2, 1)


def test_layouts_may_stand_side_by_side(tmp_path):
    write(tmp_path / "b" / "train.jsonl", *rows(1))
    write(tmp_path / "train.jsonl", *rows(1, task="a"))
    assert [task.name for task in read(tmp_path)] == ["a", "b"]


def test_the_three_folds_are_kept_apart(tmp_path):
    for count, fold in enumerate(("train", "validation", "test"), start=1):
        write(tmp_path / "t" / f"{fold}.jsonl", *rows(count))
    task = read_one(tmp_path)
    assert [len(task.train), len(task.validation), len(task.test)] == [1, 2, 3]


def test_texts_are_kept_as_they_are(tmp_path):
    write(tmp_path / "t" / "train.jsonl", {"input": " x\n", "target": "\ty "})
    (row,) = read_one(tmp_path).train
    assert (row.input, row.targets) == (" x\n", ("\ty ",))


def test_the_target_comes_first_among_the_references(tmp_path):
    write(tmp_path / "t" / "train.jsonl", {"input": "x", "target": "b", "targets": ["a", "b", "c"]})
    assert read_one(tmp_path).train[0].targets == ("b", "a", "c")


def test_a_row_without_id_is_named_by_its_place(tmp_path):
    write(tmp_path / "t" / "train.jsonl", b"", GOOD)
    (row,) = read_one(tmp_path).train
    assert (row.id, str(row.place)) == ("train:2", f"{tmp_path / 't' / 'train.jsonl'}:2")


def test_default_ids_of_a_task_in_two_files_differ(tmp_path):
    write(tmp_path / "train" / "a.jsonl", *rows(1, task="t"))
    write(tmp_path / "dev" / "a.jsonl", *rows(1, task="t"))
    task = read_one(tmp_path)
    assert (task.train[0].id, task.validation[0].id) == ("train/a:1", "dev/a:1")


def test_a_missing_label_is_the_position_of_the_target(tmp_path):
    write(tmp_path / "t" / "train.jsonl", {"input": "x", "target": "b", "choices": ["a", "b"]})
    assert read_one(tmp_path).train[0].label == 1


def test_an_optional_null_counts_as_absent(tmp_path):
    absent = dict.fromkeys(("id", "task", "targets", "choices", "label", "meta"))
    write(tmp_path / "t" / "train.jsonl", {"input": "x", "target": "y", **absent})
    assert read_one(tmp_path).train[0].id == "train:1"


def test_a_byte_order_mark_and_windows_line_ends_are_allowed(tmp_path):
    write(tmp_path / "t" / "train.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r", b"\r", GOOD + b"\r")
    assert len(read_one(tmp_path).train) == 2


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    write(tmp_path / "t" / "train.jsonl", '{"input": "a\u2028b", "target": "y"}'.encode())
    assert read_one(tmp_path).train[0].input == "a\u2028b"


def test_hidden_files_are_passed_over(tmp_path):
    write(tmp_path / "t" / "train.jsonl", GOOD)
    write(tmp_path / "t" / "._train.jsonl", b"\x00\x05")
    assert len(read_one(tmp_path).train) == 1


def test_every_taken_row_is_counted(tmp_path):
    write(tmp_path / "t" / "train.jsonl", *rows(5))
    intake = Intake()
    read(tmp_path, intake)
    assert intake.taken == 5


def test_an_unknown_key_is_warned_about_once_a_file(tmp_path, caplog):
    write(tmp_path / "a" / "train.jsonl", *rows(3, lable=1))
    write(tmp_path / "b" / "train.jsonl", *rows(3, lable=1))
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        read(tmp_path)
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "unknown key 'lable' is not read; did you mean 'label'?"
    ] * 2


# Held-out rows


def test_training_rows_are_set_aside_where_there_is_no_validation(tmp_path):
    write(tmp_path / "t" / "train.jsonl", *rows(100))
    counts = [len(read_one(tmp_path, validation_examples=n).validation) for n in (3, 100)]
    assert counts == [3, 10]


def test_another_seed_sets_other_rows_aside(tmp_path):
    write(tmp_path / "t" / "train.jsonl", *rows(100))
    assert read_one(tmp_path, seed=1).validation != read_one(tmp_path, seed=2).validation


def test_nothing_is_set_aside_beside_validation_rows(tmp_path):
    write(tmp_path / "t" / "train.jsonl", *rows(50))
    write(tmp_path / "t" / "validation.jsonl", *rows(1))
    assert len(read_one(tmp_path).train) == 50


# What is refused


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"input": "x", "target": "y"', "malformed JSON: Expecting ',' delimiter (column 29)"),
        (b'{"input": "x\xff", "target": "y"}', "bad UTF-8 at byte 13: invalid start byte"),
        (b'{"input": "x", "target": NaN}', "NaN is not JSON"),
        (b'{"input": "x", "target": "y", "meta": {"a": -Infinity}}', "-Infinity is not JSON"),
        (b'["x", "y"]', "not an object but a list"),
        (b'{"input": "x", "input": "z", "target": "y"}', "key 'input' appears twice"),
        (b'{"input": "\\ud800", "target": "y"}', "unpaired surrogate in a string"),
        (b"[" * 200_000, "malformed JSON: nested too deeply"),
        ({"input": "x"}, "missing field 'target'"),
        ({"target": "y"}, "missing field 'input'"),
        ({"input": None, "target": "y"}, "'input' is null, expected a string"),
        ({"input": "x", "target": ["y"]}, "'target' is a list, expected a string"),
        ({"input": "x", "target": True}, "'target' is a boolean, expected a string"),
        ({"input": "x", "target": "y", "id": 7}, "'id' is a number, expected a string"),
        ({"input": "x", "target": "y", "meta": "m"}, "'meta' is a string, expected an object"),
        ({"input": "x", "target": "y", "targets": "y"}, "'targets' is a string, expected a list"),
        (
            {"input": "x", "target": "y", "targets": ["y", 1]},
            "'targets' holds a number, expected strings only",
        ),
        (full_row(choices=["b", None]), "'choices' holds null, expected strings only"),
        (full_row(label=True), "'label' is a boolean, expected an integer"),
        (full_row(label=1.0), "'label' is a number, expected an integer"),
        ({"input": " \n", "target": "y"}, "empty input"),
        ({"input": "x", "target": ""}, "empty target"),
        ({"input": "x", "target": "y", "targets": ["y", " "]}, "empty target"),
        (full_row(target="c", label=None), "target 'c' is not among the choices"),
        (full_row(choices=["b"], label=0), "fewer than two different choices"),
        (full_row(choices=["b", "b"], label=1), "fewer than two different choices"),
        (full_row(label=2), "label 2 is out of range for 2 choices"),
        (full_row(label=-1), "label -1 is out of range for 2 choices"),
        (full_row(label=0), "label 0 is 'a' but the target is 'b'"),
        ({"input": "x", "target": "y", "label": 0}, "label without choices"),
        (
            {"input": "x", "target": "y", "prompt": "p"},
            "a 'prompt' without the 'id' of its raw row",
        ),
        (
            {"input": "x", "target": "y", "id": "1", "prompt": "p\x1b[31m"},
            "prompt 'p\\x1b[31m' has a character that cannot be printed",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_line_is_refused_with_its_reason(tmp_path, line, expected):
    assert reason(tmp_path, line) == expected


def test_a_number_with_too_many_digits_is_refused(tmp_path):
    line = b'{"input": "x", "target": "y", "label": ' + b"1" * 5000 + b"}"
    assert "4300" in reason(tmp_path, line)


def test_a_hidden_test_label_cannot_be_scored(tmp_path):
    expected = "label -1 (hidden test label) cannot be scored"
    assert reason(tmp_path, full_row(label=-1), fold="test") == expected


def test_an_empty_input_is_kept_on_request(tmp_path):
    write(tmp_path / "t" / "train.jsonl", {"input": "", "target": "y"})
    task = read_one(tmp_path, intake=IntakeConfig(empty_input="keep"))
    assert task.train[0].input == ""


def test_an_empty_target_is_kept_on_request(tmp_path):
    write(tmp_path / "t" / "train.jsonl", {"input": "x", "target": ""})
    task = read_one(tmp_path, intake=IntakeConfig(empty_target="keep"))
    assert task.train[0].targets == ("",)


def test_the_second_row_of_an_id_is_refused(tmp_path):
    write(tmp_path / "t" / "train.jsonl", *rows(2, id="same"))
    intake = Intake()
    read(tmp_path, intake)
    first = f"{tmp_path / 't' / 'train.jsonl'}:1"
    assert intake.rejects[0].reason == f"duplicate id 'same', first at {first}"


def test_a_held_out_row_with_the_id_of_a_training_row_is_refused(tmp_path):
    write(tmp_path / "t" / "train.jsonl", *rows(1, id="same"))
    write(tmp_path / "t" / "validation.jsonl", *rows(1, id="same"), *rows(1))
    intake = Intake()
    read(tmp_path, intake)
    assert [reject.place.file for reject in intake.rejects] == [
        str(tmp_path / "t" / "validation.jsonl")
    ]


def test_two_tasks_may_use_the_same_id(tmp_path):
    write(tmp_path / "train.jsonl", *rows(1, id="same", task="a"), *rows(1, id="same", task="b"))
    assert len(read(tmp_path)) == 2


def test_a_row_outside_task_folders_must_name_its_task(tmp_path):
    write(tmp_path / "train.jsonl", GOOD, *rows(1, task="a"))
    intake = Intake()
    read(tmp_path, intake)
    expected = "missing field 'task' (the file lies in no task's folder)"
    assert intake.rejects[0].reason == expected


def test_a_task_name_that_a_terminal_would_obey_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", *rows(1, task="a"), *rows(1, task="b\x1b[31m"))
    with pytest.raises(DataError, match=r"task 'b.x1b.31m' has a character that cannot be printed"):
        read(tmp_path)


def test_more_than_ten_refused_rows_stop(tmp_path):
    write(tmp_path / "t" / "train.jsonl", GOOD, *[b"{"] * 11)
    with pytest.raises(DataError, match="11 of 12 rows refused"):
        read(tmp_path)


@given(st.lists(st.one_of(st.binary(max_size=30), st.just(GOOD)), max_size=20))
def test_whatever_the_bytes_every_line_is_read_or_refused(lines):
    data = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(data)
        intake = Intake()
        read_lines = list(iter_rows(path, task="t", intake=intake))
    written = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert len(read_lines) + len(intake.rejects) == sum(bool(line.strip()) for line in written)


# What stops the reading


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tasks\.folder: no folder '.*nowhere' \(looked in"):
        read(tmp_path / "nowhere")


def test_a_folder_without_rows_explains_the_layouts(tmp_path):
    with pytest.raises(DataError, match=r"no file of rows; expected <task>/train\.jsonl"):
        read(tmp_path)


def test_a_misnamed_fold_is_not_passed_over(tmp_path):
    write(tmp_path / "t" / "train.jsonl", GOOD)
    write(tmp_path / "t" / "valid.jsonl", GOOD)
    with pytest.raises(DataError, match="'valid' is not a fold; did you mean 'validation'"):
        read(tmp_path)


def test_a_file_that_lies_too_deep_is_not_passed_over(tmp_path):
    write(tmp_path / "t" / "train.jsonl", GOOD)
    write(tmp_path / "suite" / "t" / "train.jsonl", GOOD)
    with pytest.raises(DataError, match="lies too deep"):
        read(tmp_path)


def test_an_empty_file_is_an_error(tmp_path):
    write(tmp_path / "t" / "train.jsonl", b"")
    with pytest.raises(DataError, match=r"train\.jsonl: no usable row; mend the file"):
        read(tmp_path)


def test_a_file_of_bad_rows_only_is_an_error_that_names_the_first(tmp_path):
    write(tmp_path / "t" / "train.jsonl", b"", b"{", b"[]")
    with pytest.raises(DataError, match=r"no usable row \(line 2: malformed JSON"):
        read(tmp_path)


def test_a_task_whose_rows_are_all_refused_is_an_error_that_names_the_first(tmp_path):
    write(
        tmp_path / "train.jsonl", *rows(3, task="a"), b'{"input": "", "target": "y", "task": "b"}'
    )
    with pytest.raises(
        DataError, match=r"no usable row of task 'b' \(1 refused, first .*:4: empty"
    ):
        read(tmp_path)


def test_a_task_without_test_rows_tells_of_those_that_were_refused(tmp_path):
    write(tmp_path / "train.jsonl", *rows(3, task="a"), *rows(3, task="b"))
    write(tmp_path / "test.jsonl", *rows(1, task="a"), {"input": "", "target": "y", "task": "b"})
    suite = JsonlTasks(suite="jsonl", folder=str(tmp_path))
    with pytest.raises(DataError, match=r"b: no test row .*\(1 refused, first .*jsonl:2: empty in"):
        read_evaluation(suite, examples=None)


def test_a_task_without_training_rows_can_be_read(tmp_path):
    write(tmp_path / "t" / "test.jsonl", GOOD)
    assert [(task.name, task.train, len(task.test)) for task in read(tmp_path)] == [("t", (), 1)]


# Real rows


@pytest.fixture(scope="module")
def t0_tasks(shared):
    intake = Intake(on_bad="error")
    return read(shared / "data" / "t0_open_sample", intake), intake


def test_the_t0_sample_has_111_tasks(t0_tasks):
    assert len(t0_tasks[0]) == 111


def test_every_row_of_the_t0_sample_is_taken(t0_tasks):
    assert t0_tasks[1].taken == 30_100


def test_every_task_of_the_t0_sample_has_validation_rows(t0_tasks):
    assert all(task.validation for task in t0_tasks[0])
