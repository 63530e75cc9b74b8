"""SuperNI: the prompts of the papers, its splits, and the draws of examples."""

import json
import logging
import random

import pytest

from mhr_scale.config import SuperNITasks
from mhr_scale.errors import DataError
from mhr_scale.tasks.task import Intake


def instances(count, **fields):
    return [{"id": f"i{n}", "input": f"x{n}", "output": [f"y{n}"], **fields} for n in range(count)]


def task_file(rows, **fields):
    positive = [
        {"input": "2 and 3", "output": "5", "explanation": "A sum."},
        {"input": "What is 1 and 1?", "output": " 2.", "explanation": "A sum."},
    ]
    return {
        "Definition": ["Add the numbers"],
        "Positive Examples": positive,
        "Instances": rows,
        **fields,
    }


def make_suite(folder, fold="train", listed=None, **tasks):
    """Write a folder in upstream's form; a string stands for a file's text."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for name, content in tasks.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "tasks" / f"{name}.json").write_text(text, encoding="utf-8")
    lines = "\n".join(tasks if listed is None else listed)
    (folder / "splits" / "default" / f"{fold}_tasks.txt").write_text(lines + "\n")
    return folder


def read(folder, into=None, **options):
    config = SuperNITasks(suite="superni", folder=str(folder), **options)
    return config.read_tasks(into or Intake())


def read_rows(folder, rows, fold="train", **options):
    make_suite(folder, fold, t=task_file(rows))
    (task,) = read(folder, fold=fold, **options)
    return task


def read_prompt(folder, fields=None, row=None, **options):
    make_suite(folder, t=task_file([{**instances(1)[0], **(row or {})}], **(fields or {})))
    (task,) = read(folder, validation_examples=0, **options)
    return task.train[0].input


def ids(rows):
    return [row.id for row in rows]


# Prompts


def test_the_mhr_prompt_ends_without_a_space(tmp_path):
    assert read_prompt(tmp_path) == (
        "Task definition: Add the numbers.\n"
        "Now complete the following example -\nInput: x0.\nOutput:"
    )


def test_the_earlier_mhr_prompt_starts_with_the_name_of_the_task(tmp_path):
    assert read_prompt(tmp_path, prompt="mhr_name") == (
        "t. Definition: Add the numbers.\n\n"
        "Now complete the following example -\nInput: x0.\nOutput: "
    )


def test_the_tk_instruct_prompt_has_a_blank_line_after_the_definition(tmp_path):
    assert read_prompt(tmp_path, prompt="tk_instruct") == (
        "Definition: Add the numbers.\n\nNow complete the following example -\nInput: x0.\nOutput: "
    )


def test_positive_examples_stand_between_definition_and_input(tmp_path):
    assert read_prompt(tmp_path, prompt="tk_instruct", positive_examples=2) == (
        "Definition: Add the numbers.\n\n"
        " Positive Example 1 -\nInput: 2 and 3.\n Output: 5.\n\n"
        " Positive Example 2 -\nInput: What is 1 and 1?\n Output: 2.\n\n"
        "Now complete the following example -\nInput: x0.\nOutput: "
    )


def test_texts_that_end_in_punctuation_get_no_full_stop(tmp_path):
    prompt = read_prompt(tmp_path, {"Definition": ["Add! "]}, {"input": " 1 + 1 = ?\n"})
    assert prompt == (
        "Task definition: Add!\nNow complete the following example -\nInput: 1 + 1 = ?\nOutput:"
    )


def test_a_definition_may_be_a_plain_string(tmp_path):
    prompt = read_prompt(tmp_path, {"Definition": "Subtract."})
    assert prompt.startswith("Task definition: Subtract.\n")


def test_only_the_first_definition_is_used(tmp_path):
    prompt = read_prompt(tmp_path, {"Definition": ["One.", "Two."]})
    assert prompt.startswith("Task definition: One.\nNow")


@pytest.mark.parametrize("prompt", ["tk_instruct", "mhr", "mhr_name"])
def test_every_prompt_ends_in_the_suffix_of_its_task(tmp_path, prompt):
    task = read_rows(tmp_path, instances(3), prompt=prompt, validation_examples=0)
    assert all(row.input.endswith(task.suffix) and task.suffix for row in task.train)


# References


def test_every_reference_of_a_row_is_kept(tmp_path):
    rows = instances(1, output=["a", " b\n"])
    assert read_rows(tmp_path, rows, validation_examples=0).train[0].targets == ("a", "b")


def test_a_reference_may_be_a_plain_string(tmp_path):
    rows = instances(1, output="a")
    assert read_rows(tmp_path, rows, validation_examples=0).train[0].targets == ("a",)


def test_all_references_make_a_training_row_each(tmp_path):
    rows = instances(1, output=["a", "b"])
    task = read_rows(tmp_path, rows, validation_examples=0, references="all")
    assert [(row.id, row.targets) for row in task.train] == [("i0#0", ("a",)), ("i0#1", ("b",))]


def test_all_references_leave_held_out_rows_whole(tmp_path):
    rows = instances(2, output=["a", "b"])
    task = read_rows(tmp_path, rows, fold="test", test_examples=1, references="all")
    assert task.test[0].targets == ("a", "b")


# Splits


def test_a_training_task_gives_the_rows_asked_for(tmp_path):
    task = read_rows(tmp_path, instances(80), train_examples=30, validation_examples=40)
    assert [len(task.train), len(task.validation), len(task.test)] == [30, 40, 0]


def test_no_row_is_in_two_folds(tmp_path):
    task = read_rows(tmp_path, instances(80), fold="test", test_examples=20)
    assert len({*ids(task.train), *ids(task.validation), *ids(task.test)}) == 80


def test_a_training_task_keeps_25_validation_rows_where_few_are_left(tmp_path):
    task = read_rows(tmp_path, instances(110))
    assert [len(task.train), len(task.validation)] == [85, 25]


def test_a_training_task_with_more_than_25_rows_left_gives_its_training_rows_first(tmp_path):
    task = read_rows(tmp_path, instances(126))
    assert [len(task.train), len(task.validation)] == [100, 26]


def test_a_training_task_that_fills_its_validation_rows_keeps_its_training_rows(tmp_path):
    task = read_rows(tmp_path, instances(105), validation_examples=5)
    assert [len(task.train), len(task.validation)] == [100, 5]


def test_a_training_task_takes_what_there_is_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        task = read_rows(tmp_path, instances(26))
    assert [len(task.train), len(task.validation)] == [1, 25]
    assert caplog.messages == ["fewer than 100 training rows in 1 task(s): t"]


def test_a_training_task_without_a_training_row_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"t\.json: 25 instances cannot fill 25 val"):
        read_rows(tmp_path, instances(25))


def test_the_first_instances_of_a_test_task_are_its_test_set(tmp_path):
    task = read_rows(tmp_path, instances(40), fold="test", test_examples=10)
    assert ids(task.test) == [f"i{n}" for n in range(10)]


def test_a_refused_test_instance_leaves_a_gap(tmp_path):
    rows = instances(40)
    rows[3]["output"] = [""]
    task = read_rows(tmp_path, rows, fold="test", test_examples=5)
    assert ids(task.test) == ["i0", "i1", "i2", "i4"]


def test_a_test_task_gives_training_rows_before_validation_rows(tmp_path):
    task = read_rows(tmp_path, instances(115), fold="test")
    assert [len(task.train), len(task.validation), len(task.test)] == [15, 0, 100]


def test_a_test_task_that_cannot_fill_test_and_training_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"100 instances cannot fill 100 test rows"):
        read_rows(tmp_path, instances(100), fold="test")


def test_the_same_seed_draws_the_same_rows(tmp_path):
    first = read_rows(tmp_path / "a", instances(300), seed=7)
    random.seed(0)
    second = read_rows(tmp_path / "b", instances(300), seed=7)
    assert ids(first.train) == ids(second.train)


def test_another_seed_draws_other_rows(tmp_path):
    first = read_rows(tmp_path / "a", instances(300), seed=7)
    second = read_rows(tmp_path / "b", instances(300), seed=8)
    assert ids(first.train) != ids(second.train)


def test_two_tasks_do_not_share_a_shuffle(tmp_path):
    make_suite(tmp_path, a=task_file(instances(300)), b=task_file(instances(300)))
    first, second = read(tmp_path)
    assert ids(first.train) != ids(second.train)


def test_reading_leaves_the_global_generator_alone(tmp_path):
    random.seed(3)
    state = random.getstate()
    read_rows(tmp_path, instances(50))
    assert random.getstate() == state


# Task lists


def test_tasks_come_sorted_by_name(tmp_path):
    make_suite(tmp_path, b=task_file(instances(30)), a=task_file(instances(30)))
    assert [task.name for task in read(tmp_path)] == ["a", "b"]


def test_only_the_tasks_asked_for_are_read(tmp_path):
    make_suite(tmp_path, b="not even JSON", a=task_file(instances(30)))
    assert [task.name for task in read(tmp_path, tasks=("a",))] == ["a"]


def test_tasks_that_are_not_listed_are_named_with_a_hint(tmp_path):
    make_suite(tmp_path, task_add=task_file(instances(30)))
    with pytest.raises(
        DataError, match=r"1 task\(s\) not listed: task_ad; did you mean 'task_add'"
    ):
        read(tmp_path, tasks=("task_ad",))


def test_ten_missing_files_are_named_and_the_others_counted(tmp_path):
    make_suite(tmp_path, listed=[f"t{n:02}" for n in range(13)])
    named = ", ".join(f"t{n:02}" for n in range(10))
    message = rf"13 listed task\(s\) without a file: {named} and 3 more; .*tasks\.missing: skip"
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_unlisted_and_missing_tasks_are_told_together(tmp_path):
    make_suite(tmp_path, listed=["a"])
    with pytest.raises(DataError, match=r"not listed: b; .* without a file: a;"):
        read(tmp_path, tasks=("a", "b"))


def test_missing_files_are_skipped_on_request_with_a_warning(tmp_path, caplog):
    make_suite(tmp_path, listed=["a", "b"], a=task_file(instances(30)))
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        tasks = read(tmp_path, missing="skip", train_examples=1)
    assert [task.name for task in tasks] == ["a"]
    assert caplog.messages == ["1 listed task(s) skipped, no file: b"]


def test_skipping_every_task_is_an_error(tmp_path):
    make_suite(tmp_path, listed=["a"])
    with pytest.raises(DataError, match="none of the listed tasks has a file"):
        read(tmp_path, missing="skip")


def test_an_unlisted_task_is_an_error_even_where_missing_files_are_skipped(tmp_path):
    make_suite(tmp_path, a=task_file(instances(30)))
    with pytest.raises(DataError, match="not listed: zebra"):
        read(tmp_path, tasks=("a", "zebra"), missing="skip")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tasks\.folder: no folder '.*nowhere'"):
        read(tmp_path / "nowhere")


def test_a_missing_split_lists_those_there_are(tmp_path):
    make_suite(tmp_path, a=task_file(instances(30)))
    with pytest.raises(DataError, match=r"xlingual/train_tasks\.txt: no such file; .*: default"):
        read(tmp_path, split="xlingual")


def test_an_empty_task_list_is_an_error(tmp_path):
    make_suite(tmp_path, listed=[])
    with pytest.raises(DataError, match=r"train_tasks\.txt: lists no task"):
        read(tmp_path)


# Real tasks


@pytest.fixture(scope="module")
def sample(shared):
    return shared / "data" / "superni_sample"


@pytest.fixture(scope="module", params=["train", "test"])
def real(request, sample):
    intake = Intake(on_bad="error")
    return request.param, read(sample, intake, fold=request.param), intake


def test_every_listed_task_of_the_sample_is_read(real):
    fold, tasks, _ = real
    assert len(tasks) == {"train": 100, "test": 20}[fold]


def test_every_instance_of_the_sample_is_taken(real, sample):
    _, tasks, intake = real
    files = [sample / "tasks" / f"{task.name}.json" for task in tasks]
    assert intake.taken == sum(len(json.loads(file.read_text())["Instances"]) for file in files)


def test_every_task_of_the_sample_gives_100_rows_of_each_kind(real):
    fold, tasks, _ = real
    counts = {(len(task.train), len(task.validation), len(task.test)) for task in tasks}
    assert counts == {(100, 100, 100 if fold == "test" else 0)}


def test_the_prompt_of_a_real_task_of_the_paper_is_spelt_as_there(sample):
    name = "task1159_bard_analogical_reasoning_containers"
    (task,) = read(sample, fold="test", tasks=(name,))
    file = json.loads((sample / "tasks" / f"{name}.json").read_text())
    assert task.test[0].input == (
        f"Task definition: {file['Definition'][0]}\nNow complete the following example -\n"
        f"Input: {file['Instances'][0]['input']}\nOutput:"
    )
