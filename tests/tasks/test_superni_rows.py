"""Rows of SuperNI files: what is read of them, and what is refused with its place."""

import json

import pytest

from mhr_scale.config import IntakeConfig, SuperNITasks
from mhr_scale.errors import DataError
from mhr_scale.tasks.task import Intake

GOOD = {"id": "good", "input": "x", "output": ["y"]}


def read(folder, content, into=None, **options):
    """Read a suite of one task `t`, given as bytes or as what its file holds."""
    (folder / "tasks").mkdir()
    (folder / "splits" / "default").mkdir(parents=True)
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "tasks" / "t.json").write_bytes(raw)
    (folder / "splits" / "default" / "train_tasks.txt").write_text("t\n")
    config = SuperNITasks(
        suite="superni", folder=str(folder), validation_examples=0, train_examples=1000, **options
    )
    (task,) = config.read_tasks(into or Intake())
    return task


def with_rows(*rows):
    return {"Definition": ["Do."], "Instances": list(rows)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "Definition": "x",\n  oops\n}', r"t\.json:3:3: malformed JSON: Expecting property"),
        (b'{\n"Definition": "\xff"}', r"t\.json:2: bad UTF-8"),
        (b"[" * 200_000, r"t\.json: malformed JSON: "),
        ([], r"t\.json: expected an object, found a list"),
        (
            b'{"Definition": "x", "Instances": [], "Instances": []}',
            r"t\.json: malformed JSON: key 'Instances' appears twice",
        ),
        (
            b'{"Definition": "x", "Instances": [{"id": "a", "input": "x", "input": "y"}]}',
            r"t\.json: malformed JSON: key 'input' appears twice",
        ),
        (
            {"Definition": "x", "Instances": [{"id": "a", "input": " ", "output": ["y"]}]},
            r"1 instances \(1 refused, first .*t\.json:1: empty input\) are of no use; mend",
        ),
        ({"Definition": "x"}, r"t\.json: missing key 'Instances'"),
        (
            {"Definitions": "x", "Instances": []},
            r"missing key 'Definition'; did you mean 'Definitio",
        ),
        ({"Definition": "x", "Instances": {}}, r"t\.json: 'Instances' is an object, expected a li"),
        ({"Definition": [], "Instances": []}, r"t\.json: 'Definition' holds no text"),
        ({"Definition": 7, "Instances": []}, r"t\.json: 'Definition' holds no text"),
        ({"Definition": [" "], "Instances": []}, r"t\.json: 'Definition' holds no text"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_place(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({}, r"t\.json: missing key 'Positive Examples'"),
        ({"Positive Examples": "none"}, "'Positive Examples' is a string, expected a list"),
        ({"Positive Examples": [{"input": "x"}]}, "'Positive Examples', number 1: expected an obj"),
    ],
)
def test_broken_positive_examples_are_an_error_where_they_are_used(tmp_path, examples, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, {**with_rows(GOOD), **examples}, positive_examples=1)


def test_positive_examples_are_not_needed_where_they_are_not_used(tmp_path):
    assert len(read(tmp_path, with_rows(GOOD)).train) == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (["x", "y"], "not an object but a list"),
        ({"input": "x", "output": ["y"]}, "missing field 'id'"),
        ({"id": "a", "output": ["y"]}, "missing field 'input'"),
        ({"id": "a", "input": "x"}, "missing field 'output'"),
        ({"id": 7, "input": "x", "output": ["y"]}, "'id' is or holds a number, expected a string"),
        (
            {"id": "a", "input": None, "output": ["y"]},
            "'input' is or holds null, expected a string",
        ),
        (
            {"id": "a", "input": "x", "output": ["y", 3]},
            "'output' is or holds a number, expected a string",
        ),
        (
            {"id": "a", "input": "x", "output": 3},
            "'output' is or holds a number, expected a string",
        ),
        ({"id": "a", "input": "x", "output": []}, "no reference in 'output'"),
        ({"id": "a", "input": "x\ud800", "output": ["y"]}, "unpaired surrogate in 'input'"),
        ({"id": "a", "input": " ", "output": ["y"]}, "empty input"),
        ({"id": "a", "input": "x", "output": ["y", "\n"]}, "empty target"),
        ({"id": "good", "input": "x", "output": ["y"]}, "duplicate id 'good'"),
    ],
)
def test_a_bad_instance_is_refused_with_its_reason(tmp_path, row, expected):
    intake = Intake()
    read(tmp_path, with_rows(GOOD, row), intake)
    assert [reject.reason for reject in intake.rejects] == [expected]


def test_a_refused_instance_is_placed_by_its_number_in_the_file(tmp_path):
    intake = Intake()
    read(tmp_path, with_rows(GOOD, {}), intake)
    assert str(intake.rejects[0].place) == f"{tmp_path / 'tasks' / 't.json'}:2"


def test_an_empty_input_is_kept_on_request(tmp_path):
    rows = with_rows({"id": "a", "input": "", "output": ["y"]})
    task = read(tmp_path, rows, intake=IntakeConfig(empty_input="keep"))
    assert task.train[0].input.endswith("Input: .\nOutput:")


def test_an_empty_target_is_kept_on_request(tmp_path):
    rows = with_rows({"id": "a", "input": "x", "output": [""]})
    task = read(tmp_path, rows, intake=IntakeConfig(empty_target="keep"))
    assert task.train[0].targets == ("",)


def test_more_than_ten_refused_instances_stop(tmp_path):
    with pytest.raises(DataError, match="11 of 12 rows refused"):
        read(tmp_path, with_rows(GOOD, *[{}] * 11))
