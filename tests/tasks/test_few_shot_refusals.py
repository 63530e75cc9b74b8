"""What the suites refuse as few-shot tasks."""

from dataclasses import replace

import pytest
from few_shot_tasks import TOY, read, write_jsonl, write_rte, write_superni

from mhr_scale.config import IntakeConfig, ShotsConfig, SuperNITasks, ToyTasks
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.suites import read_few_shot


def test_training_tasks_are_no_few_shot_tasks(tmp_path):
    with pytest.raises(ConfigError, match=r"tasks\.fold: train .*suite toy .*held_out"):
        read(ToyTasks(suite="toy"))
    with pytest.raises(ConfigError, match=r"tasks\.fold: train .*suite superni .*test"):
        read(write_superni(tmp_path, fold="train"))


def test_a_superni_row_per_reference_is_an_error():
    config = SuperNITasks(suite="superni", folder="none", fold="test", references="all")
    with pytest.raises(ConfigError, match=r"tasks\.references: all .*protocol\.references"):
        read(config)


def test_a_folder_of_shots_is_for_t0_only():
    with pytest.raises(ConfigError, match=r"shots\.folder: here .*t0_eval.*suite toy"):
        read(TOY, folder="here")


def test_more_shots_than_there_are_is_an_error(tmp_path):
    message = "task {}: {} .* 60 shots.*shots.count.*{}"
    with pytest.raises(DataError, match=message.format(".*", 40, "tasks.train_examples")):
        read(TOY, count=60)
    with pytest.raises(DataError, match=message.format("t", 15, "tasks.train_examples")):
        read(write_superni(tmp_path / "superni"), count=60)
    with pytest.raises(DataError, match=message.format("t", 46, "train.jsonl")):
        read(write_jsonl(tmp_path / "jsonl", train=50), count=60)
    with pytest.raises(DataError, match=r"rte: 40 .* 60 shots"):
        read(write_rte(tmp_path / "rte"), count=60)


def test_shots_that_are_all_set_aside_are_an_error(tmp_path):
    message = "task {}: {} shots .*shots.set_aside {} "
    with pytest.raises(DataError, match=message.format(".*", 40, 40)):
        read(TOY, set_aside=40)
    with pytest.raises(DataError, match=message.format("t", 15, 16)):
        read(write_superni(tmp_path / "superni"), set_aside=16)
    with pytest.raises(DataError, match=message.format("rte", 32, 32)):
        read(write_rte(tmp_path / "rte"), set_aside=32)


def test_superni_validation_rows_never_count_as_test_rows(tmp_path):
    config = replace(write_superni(tmp_path), test_examples=0)
    with pytest.raises(DataError, match=r"task t: no test row .*tasks\.test_examples"):
        read(config, count=5)


def test_refused_rows_are_gathered_or_an_error_as_the_suite_says(tmp_path):
    config = write_jsonl(tmp_path, train=5, test=5)
    with (tmp_path / "t" / "train.jsonl").open("a") as lines:
        lines.write('{"input": "x"}\n')
    tasks, intake = read_few_shot(config, ShotsConfig(), seed=0, examples=None)
    assert (tasks[0].n_rows, intake.taken) == (5, 10)
    assert [reject.reason for reject in intake.rejects] == ["missing field 'target'"]
    with pytest.raises(DataError, match=r"/t/train\.jsonl:6: missing field 'target'"):
        read(replace(config, intake=IntakeConfig(on_bad="error")))
