"""What the reader of P3 takes and refuses: folders, columns and rows, all made up."""

import shutil

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from p3_files import GOOD, read, write_lines, write_table

from mhr_scale.errors import DataError
from mhr_scale.tasks.t0 import p3
from mhr_scale.tasks.task import Intake

WITH_CHOICES = {**GOOD, "answer_choices": ["no ", "yes"]}


def ranked(example, choice, *, is_correct=False, **other):
    return {
        "inputs_pretokenized": f"ask {example}",
        "targets_pretokenized": f"choice {choice}",
        "idx": [example, choice],
        "is_correct": is_correct,
        **other,
    }


GROUP = [ranked(0, 0), ranked(0, 1, is_correct=True)]


def refused(folder, config="c", **options):
    """The reason why the one bad row of a folder, which holds good ones too, was refused."""
    intake = Intake()
    read(folder, config, intake=intake, **options)
    (reject,) = intake.rejects
    assert reject.task == config
    return reject.reason


# -- which folder ------------------------------------------------------------------------------


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=rf"^{tmp_path}: .*dataset_dict\.json"):
        p3.open_source(str(tmp_path))


def test_the_folder_of_one_config_is_not_a_source(tmp_path):
    write_table(tmp_path, [GOOD])
    with pytest.raises(DataError, match=rf"^{tmp_path}/c: "):
        p3.open_source(str(tmp_path / "c"))


def test_two_layouts_in_one_folder_are_ambiguous(tmp_path):
    write_table(tmp_path, [GOOD])
    write_lines(tmp_path, [GOOD], config="d")
    with pytest.raises(DataError, match=rf"^{tmp_path}: .*jsonl, parquet"):
        p3.open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such", "./none", "none", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(DataError, match=f"^tasks.source: .*'{name}'"):
        p3.open_source(name, setting="tasks.source")


def test_hidden_folders_are_passed_over(tmp_path):
    write_table(tmp_path, [GOOD])
    write_lines(tmp_path, [GOOD], config=".cache")
    assert set(p3.open_source(str(tmp_path)).splits) == {"c"}


def test_a_saved_folder_without_its_list_of_splits_is_named(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match=r"/c/dataset_dict\.json: "):
        p3.open_source(str(tmp_path))


def test_a_saved_split_that_is_absent_is_named(tmp_path):
    DatasetDict(train=Dataset.from_list([GOOD])).save_to_disk(str(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c" / "train")
    with pytest.raises(DataError, match=r"/c/train: .*FileNotFoundError"):
        read(tmp_path, "c")


def test_a_torn_table_is_named(tmp_path):
    write_table(tmp_path, [GOOD])
    file = tmp_path / "c" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"/train-00000-of-00001\.parquet: .*Arrow"):
        read(tmp_path, "c")


# -- columns -----------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_those_found_and_expected(tmp_path):
    write_table(tmp_path, [{"inputs_pretokenized": "x", "target": "y"}])
    message = (
        r"\.parquet: config c lacks targets_pretokenized; .*inputs_pretokenized, "
        r"targets_pretokenized, .*inputs_pretokenized, target$"
    )
    with pytest.raises(DataError, match=message):
        read(tmp_path, "c")


def test_a_config_of_choices_needs_their_columns(tmp_path):
    write_table(tmp_path, [GOOD], config="c_score_eval")
    with pytest.raises(DataError, match=r"config c_score_eval lacks idx, is_correct;"):
        read(tmp_path, "c_score_eval")


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("inputs_pretokenized", 5, "integers, expected text"),
        ("targets_pretokenized", ["y"], "list of text, expected text"),
        ("answer_choices", "yes|||no", "text, expected list of text"),
        ("answer_choices", [1, 2], "list of integers, expected list of text"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, column, value, found):
    write_table(tmp_path, [{**GOOD, column: value}])
    with pytest.raises(DataError, match=f"column {column} is {found}"):
        read(tmp_path, "c")


def test_pairs_of_a_fixed_length_are_pairs(tmp_path):
    write_table(tmp_path, GROUP, config="c_score_eval", idx=pa.list_(pa.int32(), 2))
    assert len(read(tmp_path, "c_score_eval")) == 1


@pytest.mark.parametrize("choices", [None, []])
def test_a_column_of_choices_may_be_empty(tmp_path, choices):
    write_table(tmp_path, [{**GOOD, "answer_choices": choices}])
    assert read(tmp_path, "c")[0].choices == ()


# -- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs_pretokenized": " \n"}, "empty input"),
        ({"targets_pretokenized": "\n"}, "empty target"),
        ({"inputs_pretokenized": None}, "'inputs_pretokenized' is null, expected a string"),
        ({"answer_choices": ["no", "maybe"]}, "target 'yes' is not among the choices"),
        ({"answer_choices": ["yes"]}, "fewer than two choices"),
        ({"answer_choices": ["yes", None]}, "'answer_choices' is not a list of strings"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(tmp_path, change, reason):
    for write in (write_table, write_lines):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder, [WITH_CHOICES, {**WITH_CHOICES, **change}])
        assert refused(folder) == reason, write


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"inputs_pretokenized": "x"}, "missing field 'targets_pretokenized'"),
        ({**GOOD, "inputs_pretokenized": 5}, "'inputs_pretokenized' is a number"),
        ({**GOOD, "answer_choices": "yes"}, "'answer_choices' is not a list"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused(tmp_path, row, reason):
    assert refused(write_lines(tmp_path, [GOOD, row])).startswith(reason)


def test_a_malformed_line_is_refused_with_its_number(tmp_path):
    write_lines(tmp_path, [GOOD])
    with (tmp_path / "c" / "train.jsonl").open("a") as file:
        file.write("{\n")
    intake = Intake()
    read(tmp_path, "c", intake=intake)
    assert str(intake.rejects[0].place).endswith("c/train.jsonl:2")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([ranked(1, 0), ranked(1, 1)], "0 of 2 "),
        ([ranked(1, 0, is_correct=True), ranked(1, 1, is_correct=True)], "2 of 2 "),
        ([ranked(1, 0, is_correct=True)], "choices [0];"),
        ([ranked(1, 0, is_correct=True), ranked(1, 2)], "choices [0, 2];"),
        ([ranked(1, 0, is_correct=True), ranked(1, 1), ranked(1, 1)], "choices [0, 1, 1];"),
        (
            [ranked(1, 0, is_correct=True), ranked(1, 1, inputs_pretokenized="other")],
            "its choices have different inputs",
        ),
        ([ranked(1, 0, is_correct=True), ranked(1, 1, targets_pretokenized=" ")], "empty target"),
        ([ranked(1, 0, is_correct=True), ranked(1, 1, is_correct=None)], "'is_correct' is missing"),
        ([{**ranked(1, 0), "idx": [1]}], "'idx' is [1]"),
        ([{**ranked(1, 0), "idx": None}], "'idx' is None"),
    ],
)
def test_an_example_whose_choices_do_not_fit_is_refused(tmp_path, rows, reason):
    for write in (write_table, write_lines):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder, [*GROUP, *rows], config="c_score_eval")
        assert refused(folder, "c_score_eval").startswith(reason), write


def test_rows_of_an_example_need_not_stand_together_or_in_order(tmp_path):
    rows = [ranked(3, 1, is_correct=True), *GROUP, ranked(3, 0)]
    write_table(tmp_path, rows, config="c_score_eval")
    first, second = read(tmp_path, "c_score_eval")
    assert (first.input, first.choices, first.label) == ("ask 3", ("choice 0", "choice 1"), 1)
    assert second.input == "ask 0"


@pytest.mark.parametrize("side", ["input", "target"])
def test_empty_texts_are_kept_on_demand(tmp_path, side):
    write_table(tmp_path, [{**GOOD, f"{side}s_pretokenized": "\n"}])
    (row,) = read(tmp_path, "c", **{f"empty_{side}": "keep"})
    assert "" in (row.input, *row.targets)


@pytest.mark.parametrize("rows", [[], [{**GOOD, "targets_pretokenized": ""}]])
def test_a_config_without_a_usable_row_is_an_error(tmp_path, rows):
    with pytest.raises(DataError, match=rf"^{tmp_path}: .* c, split train"):
        read(write_lines(tmp_path, rows), "c")
