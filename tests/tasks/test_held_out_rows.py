"""Rows of T0's held-out sets as examples under their templates."""

import json
import logging

import datasets
import pytest
from held_out_files import (
    RTE,
    RTE_TEMPLATES,
    configure,
    read_rte,
    template,
    write_rows,
    write_templates,
)

from mhr_scale.config import HeldOutTasks
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.task import Intake

# Rows


def test_a_row_becomes_an_example(tmp_path):
    (example,) = read_rte(tmp_path, RTE, templates=RTE_TEMPLATES[:1]).test
    assert (example.id, example.input) == ("7", "It rains. So It is wet.?")
    assert (example.targets, example.choices, example.label) == (("No",), ("Yes", "No"), 1)
    assert str(example.place) == f"{tmp_path / 'rte.validation.jsonl'}:1"


def test_all_templates_of_the_original_task_are_told_apart_by_id(tmp_path):
    task = read_rte(tmp_path, RTE, {**RTE, "idx": 8}, templates_mode="all")
    assert [example.id for example in task.test] == ["7/a", "7/b", "8/a", "8/b"]


def test_rows_without_a_number_are_numbered_by_position(tmp_path):
    row = {key: value for key, value in RTE.items() if key != "idx"}
    task = read_rte(tmp_path, row, {**row, "label": -1}, row)
    assert [example.id for example in task.test] == ["0", "2"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": -1}, "hidden label"),
        ({"label": ""}, "hidden label"),
        ({"label": 2}, "'label' is 2, out of range for 2 choices"),
        ({"label": None}, "missing field 'label'"),
        ({"label": "yes"}, "'label' is 'yes', expected a whole number"),
        ({"label": True}, "'label' is True, expected a whole number"),
        ({"label": 0.5}, "'label' is 0.5, expected a whole number"),
        ({"premise": None}, "missing field 'premise'"),
        ({"premise": 3}, "'premise' is a number, expected a string"),
        ({"idx": "8"}, "'idx' is a string, expected an integer"),
        ({"idx": 7}, "duplicate idx 7"),
        ({"premise": "", "hypothesis": ""}, "template 'a' renders nothing"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(tmp_path, change, reason):
    intake = Intake()
    rows = (RTE, {**RTE, "idx": 8, **change})
    task = read_rte(tmp_path, *rows, templates=RTE_TEMPLATES[1:], intake=intake)
    assert [(str(one.place), one.task, one.reason) for one in intake.rejects] == [
        (f"{tmp_path / 'rte.validation.jsonl'}:2", "rte", reason)
    ]
    assert [example.id for example in task.test] == ["7"]
    assert intake.taken == 1


@pytest.mark.parametrize(
    ("endings", "reason"),
    [
        ("two", "'endings' is a string, expected a list"),
        (["a", 3], "'endings' holds a number, expected strings only"),
        (["a", "b"], "'label' is 3, out of range for 2 choices"),
    ],
)
def test_bad_endings_are_refused(tmp_path, endings, reason):
    text = template("t", "{{ctx}} ||| {{answer_choices[label]}}", "{{endings | join('|||')}}")
    write_templates(tmp_path, "hellaswag", None, text)
    good = {"ctx": "x", "endings": ["a", "b", "c", "d", "e"], "label": 3}
    write_rows(tmp_path / "hellaswag.dev.jsonl", good, {**good, "endings": endings})
    intake = Intake()
    (task,) = configure(tmp_path, tasks=("hellaswag",)).read_tasks(intake)
    assert [reject.reason for reject in intake.rejects] == [reason]
    assert task.test[0].choices == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    ("jinja", "choices", "reason"),
    [
        ("{{premise}} ||| maybe", "Yes ||| No", "template 't': target 'maybe' is not a choice"),
        ("{{premise}} ||| Yes", None, "template 't': target 'Yes' is not a choice"),
        ("{{premise}} ||| {% if label %}{% endif %}", "Yes", "template 't' renders nothing"),
        ("{{premise}} {{genre}} ||| Yes", "Yes", "no template applies ('t' needs genre)"),
        ("{{premise.no()}} ||| Yes", "Yes", "super_glue/rte: template 't' cannot render row rte/7"),
    ],
)
def test_a_row_that_no_template_can_render_is_refused(tmp_path, jinja, choices, reason):
    templates = [template("t", jinja, choices)]
    for mode in ("draw", "all"):
        intake = Intake()
        with pytest.raises(DataError, match=r"no usable evaluation row in task\(s\) rte"):
            read_rte(tmp_path, RTE, templates=templates, intake=intake, templates_mode=mode)
        assert [reject.reason[: len(reason)] for reject in intake.rejects] == [reason], mode


def test_a_row_refused_under_one_template_is_kept_under_the_others(tmp_path):
    templates = (*RTE_TEMPLATES, template("d", "{{premise}} ||| maybe"))
    intake = Intake()
    task = read_rte(tmp_path, RTE, templates=templates, intake=intake, templates_mode="all")
    assert [example.id for example in task.test] == ["7/a", "7/b"]
    assert [reject.reason for reject in intake.rejects] == [
        "template 'd': target 'maybe' is not a choice"
    ]


def test_a_template_may_order_its_choices_in_its_own_way(tmp_path):
    text = template("t", "{{premise}} ||| {{answer_choices[1 - label]}}")
    (example,) = read_rte(tmp_path, RTE, templates=[text]).test
    assert (example.label, example.targets) == (0, ("Yes",))


def test_equal_choices_keep_the_label_of_the_row(tmp_path):
    text = template("t", "{{premise}} ||| {{answer_choices[label]}}", "Same ||| Same")
    (example,) = read_rte(tmp_path, RTE, templates=[text]).test
    assert example.label == 1


def test_too_many_bad_rows_stop(tmp_path):
    rows = [{**RTE, "idx": idx, "label": -1} for idx in range(11)]
    with pytest.raises(DataError, match=r"11 of 12 rows refused, first .*jsonl:1: hidden label"):
        read_rte(tmp_path, *rows, {**RTE, "idx": 11})


def test_fields_are_cut(tmp_path):
    row = {**RTE, "hypothesis": "word " * 100}
    (example,) = read_rte(tmp_path, row, templates=RTE_TEMPLATES[1:], max_characters=20).test
    assert len(example.input) <= 20


def test_random_wordings_follow_from_the_seed(tmp_path):
    text = template("t", "{{ range(1000) | choice }} ||| {{answer_choices[label]}}")
    inputs = [read_rte(tmp_path, RTE, templates=[text], seed=n).test[0].input for n in (1, 1, 2)]
    assert inputs[0] == inputs[1] != inputs[2]


def test_a_task_needs_a_template_of_its_original_task(tmp_path):
    with pytest.raises(DataError, match="no template of an original task for rte"):
        read_rte(tmp_path, RTE, templates=RTE_TEMPLATES[2:])


# Places


@pytest.mark.parametrize(
    "name",
    ["rte.validation.jsonl", "rte.mine.dev.jsonl", "rte/validation.jsonl", "rte/some.dev.jsonl"],
)
def test_the_split_is_the_last_word_of_a_file_name(tmp_path, name):
    write_rows(tmp_path / name, RTE)
    write_rows(tmp_path / "rte.train.jsonl", {**RTE, "idx": 8})
    write_rows(tmp_path / "rte.jsonl", {**RTE, "idx": 9})
    assert [example.id for example in read_rte(tmp_path).test] == ["7"]


@pytest.mark.parametrize(("split", "expected"), [("test", "1"), ("dev", "2")])
def test_anli_is_scored_on_the_split_asked_for(tmp_path, split, expected):
    write_templates(tmp_path, "anli", None, *RTE_TEMPLATES)
    for idx, name in enumerate(("train_r1", "test_r1", "dev_r1", "test_r2", "dev_r2")):
        write_rows(tmp_path / "anli-r1" / f"{name}.jsonl", {**RTE, "idx": idx})
    (task,) = configure(tmp_path, tasks=("anli-r1",), anli_split=split).read_tasks(Intake())
    assert [example.id for example in task.test] == [expected]


def test_two_files_of_one_split_are_an_error(tmp_path):
    write_rows(tmp_path / "rte.dev.jsonl", RTE)
    with pytest.raises(DataError, match=r"dev\.jsonl and .*tion\.jsonl are the same split of rte"):
        read_rte(tmp_path, RTE)


def test_a_file_without_a_split_in_its_name_is_not_guessed_at(tmp_path):
    write_rows(tmp_path / "rte.jsonl", RTE)
    with pytest.raises(DataError, match=r"rte \(validation wanted, rte\.jsonl there\)"):
        read_rte(tmp_path)


def test_hellaswag_goes_by_the_name_of_t_few_too(tmp_path):
    text = template("t", "{{ctx}} ||| {{answer_choices[label]}}", "{{endings | join('|||')}}")
    write_templates(tmp_path, "hellaswag", None, text)
    row = {"ctx": "x", "endings": ["a", "b", "c", "d"], "label": "1"}
    write_rows(tmp_path / "h-swag" / "validation.jsonl", row)
    (task,) = configure(tmp_path, tasks=("hellaswag",)).read_tasks(Intake())
    assert task.name == "hellaswag"


def test_missing_tasks_are_skipped_on_request(tmp_path, caplog):
    write_templates(tmp_path, "super_glue", "rte", *RTE_TEMPLATES)
    write_rows(tmp_path / "rte.validation.jsonl", RTE)
    with caplog.at_level(logging.WARNING, "mhr_scale"):
        tasks = configure(tmp_path, tasks=("cb", "rte"), missing="skip").read_tasks(Intake())
    assert [task.name for task in tasks] == ["rte"]
    assert "1 task(s) skipped, no evaluation rows: cb (validation wanted" in caplog.text


def test_no_task_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no evaluation rows of any task asked for"):
        configure(tmp_path, missing="skip").read_tasks(Intake())


def test_tasks_keep_the_order_of_the_suite(tmp_path):
    for name in ("cb", "rte"):
        write_templates(tmp_path, "super_glue", name, *RTE_TEMPLATES)
        write_rows(tmp_path / f"{name}.validation.jsonl", RTE)
    tasks = configure(tmp_path, tasks=("cb", "rte", "cb")).read_tasks(Intake())
    assert [task.name for task in tasks] == ["rte", "cb"]


def test_an_unknown_task_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no held-out task is called 'h-swag'; did you mean 'hel"):
        configure(tmp_path, tasks=("h-swag",)).read_tasks(Intake())


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none: no such folder; set tasks\.folder"):
        configure(tmp_path, folder=str(tmp_path / "none")).read_tasks(Intake())


def test_local_rows_need_a_folder():
    with pytest.raises(ConfigError, match=r"tasks\.folder: not set"):
        HeldOutTasks(suite="t0_eval", templates="x")


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_tables_are_read_as_json_lines_are(tmp_path, ending):
    text = template("t", "{{ctx}} ||| {{answer_choices[label]}}", "{{endings | join('|||')}}")
    write_templates(tmp_path, "hellaswag", None, text)
    rows = [
        {"ctx": f"a, {n}", "endings": ["x", "y z"], "label": n % 2, "idx": 7 + n} for n in range(3)
    ]
    table = datasets.Dataset.from_list(rows)
    path = tmp_path / f"hellaswag.validation.{ending}"
    if ending == "parquet":
        table.to_parquet(path)
    else:
        cells = table.map(lambda row: {"endings": json.dumps(row["endings"])}).to_pandas()
        cells.to_csv(path, index=False, sep="," if ending == "csv" else "\t")
    intake = Intake(on_bad="error")
    (task,) = configure(tmp_path, tasks=("hellaswag",)).read_tasks(intake)
    assert [(row.id, row.input, row.targets, row.choices) for row in task.test] == [
        ("7", "a, 0", ("x",), ("x", "y z")),
        ("8", "a, 1", ("y z",), ("x", "y z")),
        ("9", "a, 2", ("x",), ("x", "y z")),
    ]


def test_saved_data_sets_are_read(tmp_path):
    table = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([{**RTE, "idx": 1}]),
            "validation": datasets.Dataset.from_list([RTE, {**RTE, "idx": 8, "premise": None}]),
        }
    )
    table.save_to_disk(tmp_path / "rte")
    intake = Intake()
    (example,) = read_rte(tmp_path, intake=intake).test
    assert (example.id, str(example.place)) == ("7", f"{tmp_path / 'rte' / 'validation'}:1")
    assert [reject.reason for reject in intake.rejects] == ["missing field 'premise'"]


def test_a_broken_saved_data_set_is_an_error(tmp_path):
    datasets.Dataset.from_list([RTE]).save_to_disk(tmp_path / "rte" / "validation")
    (tmp_path / "rte" / "validation" / "state.json").unlink()
    with pytest.raises(DataError, match=r"validation: cannot be read \("):
        read_rte(tmp_path)


@pytest.mark.parametrize("split", ["test", "dev"])
def test_the_hub_is_asked_for_the_evaluation_splits(tmp_path, monkeypatch, split):
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([RTE])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write_templates(tmp_path, "super_glue", "rte", *RTE_TEMPLATES)
    write_templates(tmp_path, "anli", None, *RTE_TEMPLATES)
    config = configure(
        tmp_path, source="hub", folder=None, tasks=("rte", "anli-r2"), anli_split=split
    )
    tasks = config.read_tasks(Intake())
    assert asked == [
        ("aps/super_glue", "rte", "validation"),
        ("facebook/anli", None, f"{split}_r2"),
    ]
    assert str(tasks[0].test[0].place) == "aps/super_glue/rte/validation:1"


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    def load_dataset(name, subset, *, split):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"rte: no split 'validation' from the hub \(no route\); "):
        read_rte(tmp_path, source="hub")
