"""CrossFit's files and partitions, from hand-made folders in its format."""

import json
import logging
import sys
from collections import Counter
from dataclasses import replace

import pytest
from crossfit_files import LISTS, write_crossfit, write_task
from few_shot_tasks import check_promises, ids, read
from processes import ROOT

from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.crossfit import partitions
from mhr_scale.tasks.suites import open_suite, read_evaluation, source_files
from mhr_scale.tasks.task import IntakeConfig


@pytest.fixture
def suite(tmp_path):
    return write_crossfit(tmp_path)


def tasks_of(suite):
    return {task.name: task for task in open_suite(suite).tasks}


def rewrite(suite, path, text):
    file = f"{suite.folder}/{path}"
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
    return file


# Partitions


def test_the_tool_writes_the_table_that_is_shipped(shared, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch" / "tools"))
    import make_crossfit_table

    reference = json.loads((shared / "reference" / "crossfit.json").read_text())
    folder = tmp_path / "dataloader" / "custom_tasks_splits"
    folder.mkdir(parents=True)
    text = f"import x\n\nMETRICS = {reference['metrics']}  # all\n\ndef f(): ...\n"
    (tmp_path / "dataloader" / "metrics.py").write_text(text)
    for name, lists in reference["splits"].items():
        file = folder / f"{make_crossfit_table.FILES[name]}.json"
        file.write_text(json.dumps({"all": [], **lists}))
    out = tmp_path / "table.json"
    argv = ["make_crossfit_table.py", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    make_crossfit_table.main()
    assert out.read_bytes() == partitions.TABLE.read_bytes()
    table = json.loads(out.read_text())
    assert table["metrics"] == reference["metrics"]
    assert table["partitions"] == reference["splits"]


def test_partitions_by_name():
    random = partitions.open_partition("random")
    assert [len(random.tasks(fold)) for fold in partitions.FOLDS] == [120, 20, 20]
    assert Counter(map(partitions.metric_of, random.test))["Matthew-Correlation"] == 1
    without_nli = partitions.open_partition("train_non_nli_test_nli")
    assert without_nli.test == ()
    assert without_nli.tasks("test") == without_nli.dev
    assert without_nli.in_both == ["sick"]
    names = partitions.partition_names()
    assert [n for n in names if partitions.open_partition(n).in_both] == ["train_non_nli_test_nli"]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({**LISTS, "test": ["glue-cole"]}, "test: 1 unknown task.*glue-cole.*did you mean 'glue-c"),
        ({"train": ["boolq"]}, "'dev' is no list of names"),
        ({"train": "boolq", "dev": []}, "'train' is no list of names"),
        ([], "expected an object with the lists train, dev, test"),
    ],
)
def test_a_partition_that_makes_no_sense_is_refused(suite, tmp_path, lists, message):
    (tmp_path / "partition.json").write_text(json.dumps(lists))
    with pytest.raises(DataError, match=message):
        open_suite(suite)


def test_a_partition_that_is_not_there_is_refused(suite, tmp_path):
    with pytest.raises(ConfigError, match=r"no partition 'randon'.*'random'"):
        replace(suite, partition="randon")
    with pytest.raises(DataError, match=r"none\.json cannot be read.*or one of random"):
        open_suite(replace(suite, partition=str(tmp_path / "none.json")))
    (tmp_path / "partition.json").write_text("{")
    with pytest.raises(DataError, match=r"partition\.json: malformed JSON"):
        open_suite(suite)


# Rows


def test_a_training_task_has_the_rows_of_all_seeds(suite):
    tasks = tasks_of(suite)
    assert list(tasks) == sorted(LISTS["train"])
    task = tasks["boolq"]
    assert ids(task.train) == [f"{s}_train:{n}" for s in (13, 21) for n in (1, 2, 3, 4)]
    assert ids(task.validation) == [f"{s}_dev:{n}" for s in (13, 21) for n in (1, 2, 3, 4)]
    assert task.test == ()
    first = task.train[1]
    assert (first.input, first.targets) == (" [boolq] 13 train 1", (" yes",))
    assert str(first.place).endswith("boolq_4_13_train.tsv:2")
    assert (task.metric, tasks["imdb"].metric) == ("same_text", "macro_f1")
    assert suite.target_choice() == "random"


def test_a_few_shot_task_has_the_rows_of_one_seed_and_all_its_outputs(suite):
    test = replace(suite, fold="test")
    for seed in (13, 21):
        tasks = read(test, seed=seed)
        check_promises(tasks, seed=seed)
        assert [one.task.name for one in tasks] == sorted(LISTS["test"])
        one = tasks[0]
        assert one.n_rows == 4
        assert ids(one.task.train) == [f"{seed}_train:{n}" for n in (1, 2, 3, 4)]
        assert ids(one.task.validation) == [f"{seed}_dev:{n}" for n in (1, 2, 3, 4)]
        assert ids(one.task.test) == ["test:1", "test:2", "test:3"]
        assert one.task.test[1].targets == (" answer 1", " the 1")
    assert test.selects_on == "held_out"
    assert read(test, seed=13, count=2)[0].n_rows == 2
    assert len(read(replace(test, test_examples=1), seed=13)[0].task.test) == 1


def test_dev_tasks_serve_where_there_is_none_to_test(suite, tmp_path, caplog):
    lists = {**LISTS, "dev": ["app_reviews", "imdb"], "test": []}
    (tmp_path / "partition.json").write_text(json.dumps(lists))
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        tasks, _ = read_evaluation(replace(suite, fold="test"), examples=None)
    assert [(task.name, task.metric) for task in tasks] == [
        ("app_reviews", "pearson"),
        ("imdb", "macro_f1"),
    ]
    assert "trains on 1 of the tasks that it tests: imdb" in caplog.text


def test_in_a_chat_template_no_text_begins_with_a_blank(suite):
    row = tasks_of(replace(suite, chat=True))["boolq"].train[0]
    assert (row.input, row.targets) == ("[boolq] 13 train 0", ("no",))


def test_ends_of_lines_and_lines_without_text_do_not_count(suite):
    text = "\ufeff one\tyes\r\n\n  \t \ntwo \t no\t nay \t\n"
    rewrite(suite, "boolq/boolq_4_13_train.tsv", text)
    rows = tasks_of(replace(suite, seeds=(13,)))["boolq"].train
    assert [(row.id, row.input, row.targets) for row in rows] == [
        ("13_train:1", " [boolq] one", (" yes",)),
        ("13_train:4", " [boolq] two", (" no", " nay")),
    ]


def test_the_cache_of_tokens_sees_files_and_partition(suite):
    names = {path.name for path in source_files(suite)}
    assert {"partition.json", "boolq_4_13_train.tsv"} <= names
    assert {path.name for path in source_files(replace(suite, partition="random"))} < names


# What is refused


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("boolq", "no tab", "1 column, expected an input and one or more outputs, separated by"),
        ("boolq", "\tyes", "1 column"),
        ("boolq", "x\t\tyes", "empty target"),
        ("app_reviews", "x\tfive", "'five' is no number, and pearson correlates numbers"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(suite, task, row, reason):
    file = rewrite(suite, f"{task}/{task}_4_13_dev.tsv", f"x\t1\n{row}\n")
    suite = replace(suite, fold="train" if task == "boolq" else "dev")
    with pytest.raises(DataError, match=rf"{file}:2: {reason}.*\(task {task}\); mend the row"):
        open_suite(suite)
    allowed = replace(suite, intake=IntakeConfig(on_bad="reject"))
    reading = open_suite(allowed)
    assert "13_dev:1" in {row.id for one in reading.tasks for row in one.validation}
    assert [reject.reason[:8] for reject in reading.intake.rejects] == [reason[:8]]


def test_bytes_that_are_no_text_are_refused_with_their_line(suite):
    with open(f"{suite.folder}/imdb/imdb_4_21_train.tsv", "ab") as stream:
        stream.write(b"bad \xff\tyes\n")
    with pytest.raises(DataError, match=r"imdb_4_21_train\.tsv:5: bad UTF-8 at byte 5"):
        open_suite(suite)


@pytest.mark.parametrize("fold", ["train", "dev"])
def test_a_task_without_rows_is_refused(suite, fold):
    file = rewrite(suite, f"boolq/boolq_4_21_{fold}.tsv", "\n")
    with pytest.raises(DataError, match=f"task boolq: no {fold} row under seed 21: {file} holds"):
        open_suite(suite)


def test_a_task_without_its_dev_or_test_file_is_refused(suite, tmp_path):
    (tmp_path / "data" / "glue-cola" / "glue-cola_4_13_dev.tsv").unlink()
    test = replace(suite, fold="test")
    with pytest.raises(DataError, match=r"task glue-cola: no dev rows: .*_13_dev\.tsv is not"):
        read(test, seed=13)
    (tmp_path / "data" / "glue-cola" / "glue-cola_4_21_test.tsv").unlink()
    with pytest.raises(DataError, match=r"task glue-cola: no test rows: .*_21_test\.tsv is not"):
        read(test, seed=21)


def test_seeds_that_are_not_there_and_shots_of_two_sizes_are_refused(suite, tmp_path):
    with pytest.raises(DataError, match=r"no file boolq_<k>_42_train\.tsv; seeds there: 13, 21"):
        open_suite(replace(suite, seeds=(42,)))
    (tmp_path / "data" / "boolq" / "boolq_16_13_train.tsv").write_text("x\ty\n")
    with pytest.raises(DataError, match=r"boolq_16_13_train\.tsv, boolq_4_13_train\.tsv; keep one"):
        open_suite(suite)
    with pytest.raises(ConfigError, match=r"tasks\.seeds: \[13, 13\] are not different"):
        replace(suite, seeds=(13, 13))


def test_tasks_that_are_not_there_are_named_with_a_hint(suite, tmp_path):
    with pytest.raises(DataError, match=r"tasks\.tasks: 1 task.*not in train.*'boolq'"):
        open_suite(replace(suite, tasks=("boolqq",)))
    (tmp_path / "data" / "boolq").rename(tmp_path / "data" / "boolq2")
    with pytest.raises(DataError, match=r"1 task.s. without a folder: boolq.*'boolq2'.*or set"):
        open_suite(suite)
    assert list(tasks_of(replace(suite, missing="skip"))) == ["imdb"]
    with pytest.raises(DataError, match=r"without a folder: boolq.*; add them$"):
        open_suite(replace(suite, missing="skip", tasks=("boolq",)))


def test_tasks_that_were_trained_on_are_no_few_shot_tasks(suite):
    with pytest.raises(ConfigError, match=r"tasks\.fold: train tasks were trained on"):
        read(suite, seed=13)


def test_a_name_with_underscores_is_not_taken_for_another_tasks(tmp_path):
    folder = tmp_path / "data"
    write_task(folder, "hate_speech18")
    (folder / "hate_speech18" / "hate_speech18_x_4_13_train.tsv").write_text("x\ty\n")
    suite = write_crossfit(tmp_path)
    lists = {**LISTS, "train": ["hate_speech18"]}
    (tmp_path / "partition.json").write_text(json.dumps(lists))
    assert len(tasks_of(suite)["hate_speech18"].train) == 8
