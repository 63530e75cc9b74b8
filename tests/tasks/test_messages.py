"""Conversations as rows, and rows whose fields have other names."""

import json
from pathlib import Path
from typing import Any

import pytest

from mhr_scale.config import JsonlTasks
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.task import Intake, Task, Turn

FLAN = {"input": "inputs", "target": "targets", "task": "task_name"}


def turns(*told: str) -> list[dict[str, str]]:
    """`role: content` as messages."""
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in told]


def write(folder: Path, *rows: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(folder: Path, intake: Intake | None = None, **options: Any) -> list[Task]:
    options = {"chat": True, **options}
    suite = JsonlTasks(suite="jsonl", folder=str(folder), validation_examples=0, **options)
    return suite.read_tasks(intake or Intake())


LONG = turns("system: S", "user: a", "assistant: A", "user: b", "tool: t", "assistant: B")


def test_every_turn_of_the_assistant_is_a_target_behind_all_before_it(tmp_path: Path) -> None:
    (task,) = read(write(tmp_path, {"messages": LONG, "task": "talk"}))
    first, second = task.train
    assert (first.input, first.role, first.targets) == ("a", "user", ("A",))
    assert first.history == (Turn(role="system", content="S"),)
    assert (second.input, second.role, second.targets) == ("t", "tool", ("B",))
    assert [turn.content for turn in second.history] == ["S", "a", "A", "b"]
    assert (task.name, task.metric) == ("talk", "rougeL")


def test_the_turns_of_a_conversation_are_one_raw_row(tmp_path: Path) -> None:
    rows = [{"messages": LONG, "task": "talk"}, {"messages": LONG, "task": "talk", "id": "own"}]
    rows += [{"messages": turns("user: a", "assistant: A", "user: more"), "task": "talk"}]
    (task,) = read(write(tmp_path, *rows))
    assert [(row.id, row.raw_id) for row in task.train] == [
        ("train:1/turn 1", "train:1"),
        ("train:1/turn 2", "train:1"),
        ("own/turn 1", "own"),
        ("own/turn 2", "own"),
        ("train:3", "train:3"),
    ]


def test_plain_rows_stand_beside_conversations(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", {"messages": LONG}, {"input": "q", "target": "a"})
    (task,) = read(folder.parent)
    assert [row.input for row in task.train] == ["a", "t", "q"]
    assert task.train[2].history == ()


MISTAKES = [
    ([], "messages: no turn of the assistant to learn from"),
    (turns("system: s", "user: u"), "messages: no turn of the assistant to learn from"),
    (turns("assistant: a"), "messages: turn 1: the assistant answers nobody"),
    (turns("system: s", "assistant: a"), "messages: turn 2: the assistant answers nobody"),
    (
        turns("user: u", "assistant: a", "assistant: b"),
        "messages: turn 3: the assistant answers nobody",
    ),
    (turns("user: u", "system: s"), "messages: turn 2: the system speaks first or not at all"),
    (turns("human: u"), "messages: turn 1: unknown role 'human'; known: system, user, assistant"),
    (turns("usr: u"), "messages: turn 1: unknown role 'usr'; did you mean 'user'?"),
    ([*turns("user: u"), {"role": "assistant", "content": " "}], "turn 2: the assistant says not"),
    ([{"role": "user", "content": ""}], "messages: turn 1: the user says nothing"),
    (["hello"], "messages: turn 1 is a string, expected an object of role and content"),
    ([{"role": "user"}], "messages: turn 1: 'content' is missing"),
    ([{"role": "user", "content": None}], "messages: turn 1: 'content' is null, expected a string"),
    ([{"role": "user", "content": ["x"]}], "turn 1: 'content' is a list, expected a string"),
    ([{"content": "x"}], "messages: turn 1: 'role' is missing"),
    (
        [*turns("user: u"), {"role": "assistant", "content": "c", "tool_calls": [{}]}],
        "messages: turn 2: 'tool_calls' is not read; write calls into the content",
    ),
    ("hello", "'messages' is a string, expected a list"),
]


def test_bad_conversations_are_refused_with_file_and_line(tmp_path: Path) -> None:
    good = {"messages": LONG, "task": "t"}
    more = [
        ({**good, "target": "x"}, "'target' beside 'messages'; a row is one or the other"),
        ({**good, "task": None}, "missing field 'task'"),
    ]
    rows = [*({"messages": said, "task": "t"} for said, _ in MISTAKES), *(row for row, _ in more)]
    write(tmp_path, good, *rows)
    intake = Intake(on_bad="skip")
    (task,) = read(tmp_path, intake)
    assert len(task.train) == 2
    assert [reject.place.line for reject in intake.rejects] == list(range(2, len(rows) + 2))
    for reject, (_, reason) in zip(intake.rejects, [*MISTAKES, *more], strict=True):
        assert reason in reject.reason
        assert "\n" not in reject.reason
    with pytest.raises(DataError, match=r"^.*/train\.jsonl:2: messages: no turn of the assistant"):
        read(tmp_path, Intake(on_bad="error"))


def test_conversations_without_a_template_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"messages": LONG, "task": "t"})
    expected = r"\(line 1: 'messages' are a conversation: set tasks\.chat: true\)"
    with pytest.raises(DataError, match=expected):
        read(tmp_path, chat=False)


# -- other names of fields -------------------------------------------------------------------------

ROW = {"inputs": "q", "targets": "a", "task_name": "cola", "task_source": "P3", "target": "no"}


def test_rows_of_flan_are_read_by_their_own_names(tmp_path: Path) -> None:
    (task,) = read(write(tmp_path, ROW), fields=FLAN, chat=False)
    assert task.name == "cola"
    assert [(row.input, row.targets) for row in task.train] == [("q", ("a",))]


def test_tables_may_have_other_names_too(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.csv").write_text('inputs,targets,options\nq,a,"[""a"", ""b""]"\n')
    fields = {"input": "inputs", "target": "targets", "choices": "options"}
    (task,) = read(tmp_path, fields=fields)
    (row,) = task.train
    assert (row.input, row.targets, row.choices) == ("q", ("a",), ("a", "b"))


def test_messages_may_have_another_name(tmp_path: Path) -> None:
    (task,) = read(write(tmp_path / "t", {"talk": LONG}).parent, fields={"messages": "talk"})
    assert len(task.train) == 2


@pytest.mark.parametrize(
    ("fields", "row", "expected"),
    [
        ({}, ROW, "missing field 'input'; to read 'inputs', set tasks.fields: {input: inputs}"),
        (FLAN, {**ROW, "inputs": 3}, "'inputs' is a number, expected a string"),
        (FLAN, {"inputs": "q", "task_name": "t"}, "missing field 'targets'"),
    ],
)
def test_mistakes_name_fields_as_the_file_does(
    tmp_path: Path, fields: dict[str, str], row: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, row), fields=fields)
    assert f"(line 1: {expected})" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"inputs": "x"},
            "tasks.fields: a row has no field 'inputs'; did you mean 'input'?; known",
        ),
        ({"input": "x", "target": "x"}, "tasks.fields: 'x' stands for two fields; name one"),
    ],
)
def test_names_that_make_no_sense_are_refused(fields: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(Path("f"), fields=fields)
    assert expected in str(caught.value)
