"""Own rows in CSV, TSV and Parquet: as those of JSON lines, and files that are not read."""

import logging
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from mhr_scale.config import JsonlTasks
from mhr_scale.errors import DataError
from mhr_scale.tasks.task import Intake

ROWS = [
    {"id": "a", "input": "x, y", "target": "no", "choices": ["yes", "no"], "label": 1},
    {"id": None, "input": "two\nlines", "target": "yes", "choices": ["yes", "no"], "label": None},
    {"id": "c", "input": 'a "word"', "target": "no", "choices": ["no", "yes"], "label": None},
]
JSONL = """
{"id": "a", "input": "x, y", "target": "no", "choices": ["yes", "no"], "label": 1}
{"id": null, "input": "two\\nlines", "target": "yes", "choices": ["yes", "no"]}
{"id": "c", "input": "a \\"word\\"", "target": "no", "choices": ["no", "yes"]}
"""
CSV = '''id,input,target,choices,label
a,"x, y",no,"[""yes"", ""no""]",1
,"two
lines",yes,"[""yes"", ""no""]",
c,"a ""word""",no,"[""no"", ""yes""]",
'''
TSV = """id\tinput\ttarget\tchoices\tlabel
a\tx, y\tno\t"[""yes"", ""no""]"\t1
\t"two
lines"\tyes\t"[""yes"", ""no""]"\t
c\t"a ""word\"""\tno\t"[""no"", ""yes""]"\t
"""


def put(path, content):
    """Write text, bytes, or rows as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        parquet.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(folder, into=None, **options):
    return JsonlTasks(suite="jsonl", folder=str(folder), **options).read_tasks(into or Intake())


@pytest.mark.parametrize(
    ("ending", "content", "line"),
    [("csv", CSV, 3), ("tsv", TSV, 3), ("parquet", ROWS, 2), ("CSV", CSV, 3)],
)
def test_a_table_gives_the_examples_of_the_same_json_lines(tmp_path, ending, content, line):
    put(tmp_path / "lines" / "t" / "train.jsonl", JSONL)
    put(tmp_path / "table" / "t" / f"train.{ending}", content)
    (expected,), (found,) = read(tmp_path / "lines"), read(tmp_path / "table")
    facts = [
        [(e.input, e.targets, e.choices, e.label) for e in task.train] for task in (expected, found)
    ]
    assert facts[0] == facts[1]
    assert len(facts[0]) == 3
    assert found.metric == "accuracy"
    assert [row.id for row in found.train] == ["a", f"train:{line}", "c"]
    assert found.train[1].place.line == line


@pytest.mark.parametrize(
    ("row", "line", "reason"),
    [
        ("x", 4, r"1 cells, expected the 3 of the header \(input, target, choices\)"),
        ("x,y,z,u", 4, "4 cells, expected the 3 of the header"),
        ("x,y,yes|y", 4, "'choices' is to hold JSON: malformed JSON: Expecting value"),
        ("x,y,7", 4, "'choices' is a number, expected a list"),
        ('x,y,"[""y"", 1]"', 4, "'choices' holds a number, expected strings only"),
        (",y,", 4, "empty input"),
        ('"a\nb",,', 4, "empty target"),
        (b"\xff,y,", 4, "bad UTF-8"),
    ],
)
def test_a_bad_row_of_a_table_is_refused_with_its_line(tmp_path, row, line, reason):
    raw = row if isinstance(row, bytes) else row.encode()
    put(tmp_path / "t" / "train.csv", b'input,target,choices\n"a\nb",y,\n' + raw + b"\nu,v,\n")
    intake = Intake()
    (task,) = read(tmp_path, intake)
    (reject,) = intake.rejects
    assert len(task.train) == 2
    assert (reject.place.line, reject.task) == (line, "t")
    with pytest.raises(DataError, match=reason):
        raise DataError(reject.reason)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('input,target\n"a,b\nc,d\n', r"train\.csv:2: the row that begins here is not CSV"),
        ("input,target,input\na,b,c\n", r"train\.csv:1: column 'input' stands twice; rename one"),
        ("input;target\na;b\n", r"csv:1: a header of one column, 'input;target'; separate cells"),
        ("input,target\na,b\n".encode("utf-16"), r"csv:1: a header of .*; save it as UTF-8"),
        ("inputs,target\na,b\n", r"; to read 'inputs', set tasks\.fields: \{input: inputs\}\)"),
        ("", "no usable row"),
        ("input,target\n", "no usable row"),
    ],
)
def test_a_table_that_makes_no_sense_is_an_error(tmp_path, content, message):
    put(tmp_path / "t" / "train.csv", content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    put(tmp_path / "t" / "train.parquet", b"no table")
    with pytest.raises(DataError, match=r"train\.parquet: cannot be read"):
        read(tmp_path)


def test_values_of_a_table_have_the_types_of_json(tmp_path):
    put(tmp_path / "t" / "train.parquet", [{"input": b"x", "target": "y"}] * 2)
    with pytest.raises(DataError, match="'input' is of type bytes, expected a string"):
        read(tmp_path)


def test_a_cell_may_be_longer_than_the_csv_library_takes_by_itself(tmp_path):
    put(tmp_path / "t" / "train.csv", f"input,target\n{'x' * 200_000},y\n")
    (task,) = read(tmp_path)
    assert len(task.train[0].input) == 200_000


def test_a_byte_order_mark_and_windows_line_ends_are_allowed(tmp_path):
    put(tmp_path / "t" / "train.csv", b"\xef\xbb\xbfinput,target\r\nx,y\r\n\r\nu,v\r\n")
    (task,) = read(tmp_path)
    assert [row.targets for row in task.train] == [("y",), ("v",)]


def test_folds_may_have_different_formats(tmp_path):
    put(tmp_path / "t" / "train.csv", "input,target\nx,y\n")
    put(tmp_path / "t" / "test.parquet", [{"input": "u", "target": "v"}])
    (task,) = read(tmp_path)
    assert (len(task.train), len(task.test)) == (1, 1)


def test_a_fold_in_two_formats_is_an_error(tmp_path):
    put(tmp_path / "t" / "train.csv", "input,target\nx,y\n")
    put(tmp_path / "t" / "train.jsonl", '{"input": "x", "target": "y"}')
    with pytest.raises(DataError, match=r"train\.\w+: stands beside train\.\w+; keep one"):
        read(tmp_path)


def test_files_that_are_not_read_are_named_in_one_warning(tmp_path, caplog):
    put(tmp_path / "t" / "train.jsonl", '{"input": "x", "target": "y"}')
    put(tmp_path / "tasks.yaml", "t: {cap: 3}")
    for name in ("summary.csv", "t/train.json", "u/train.xlsx", "README.md", "t/LICENSE", ".x"):
        put(tmp_path / name, "?")
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        read(tmp_path)
    (record,) = caplog.records
    assert "3 file(s) not read: summary.csv, t/train.json, u/train.xlsx;" in record.getMessage()


def test_a_folder_without_rows_names_what_is_there(tmp_path):
    put(tmp_path / "t" / "train.json", "[]")
    with pytest.raises(DataError, match=r"no file of rows \(there are: t/train\.json\)"):
        read(tmp_path)


def test_a_table_in_a_task_s_folder_that_is_no_fold_is_an_error(tmp_path):
    put(tmp_path / "t" / "train.jsonl", '{"input": "x", "target": "y"}')
    put(tmp_path / "t" / "more.csv", "input,target\nx,y\n")
    with pytest.raises(
        DataError, match=r"more\.csv: 'more' is not a fold; name the file train\.csv"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name", [b"t\xff", b"t\x1b[31m"])
def test_names_that_are_not_printable_are_refused_at_the_door(tmp_path, name):
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    with open(os.path.join(folder, b"train.jsonl"), "w") as file:
        file.write('{"input": "x", "target": "y"}')
    with pytest.raises(DataError, match="a name that is not printable UTF-8; rename it") as caught:
        read(tmp_path)
    assert str(caught.value).isprintable()
