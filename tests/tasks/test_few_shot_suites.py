"""Few-shot tasks of the toy suite, of Super-NaturalInstructions and of JSON lines."""

from dataclasses import replace

import pytest
from few_shot_tasks import TOY, check_promises, ids, read, write_jsonl, write_superni
from held_out_files import write_rows

from mhr_scale.config import JsonlTasks, SuperNITasks
from mhr_scale.errors import DataError
from mhr_scale.tasks import toy
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.tasks.task import Intake

# Toy


@pytest.mark.parametrize("seed", [0, 42, -1, 2**40])
def test_toy_tasks_are_the_held_out_compositions_with_a_few_of_their_rows(seed):
    tasks = read(TOY, seed=seed, count=32)
    check_promises(tasks, seed=seed)
    made = toy.held_out_tasks(TOY)
    assert [one.task.name for one in tasks] == [task.name for task in made]
    for one, task in zip(tasks, made, strict=True):
        assert one.n_rows == 32
        assert one.draw(0) == one.draw(7) == one.task.train
        assert set(one.task.train) < set(task.train)
        assert one.task.test == task.test
        assert (one.task.validation, one.selection) == ((), ())


def test_toy_shots_follow_from_the_seed_and_the_task():
    (first, second), (other, _) = read(TOY, seed=1)[:2], read(TOY, seed=2)[:2]

    def order(one):
        return [int(id.rpartition(":")[2]) for id in ids(one.task.train)]

    assert sorted(order(first)) == sorted(order(other)) == list(range(40))
    assert len({tuple(order(one)) for one in (first, second, other)}) == 3
    assert first.task.train == read(TOY, seed=1)[0].task.train


def test_shots_set_aside_are_the_last_of_the_draw():
    whole, (cut, *_) = read(TOY, count=32)[0].task.train, read(TOY, count=32, set_aside=8)
    assert cut.task.train == cut.draw(0) == whole[:24]
    assert cut.selection == whole[24:]
    assert cut.n_rows == 24


def test_only_the_first_test_rows_are_kept_on_request():
    (whole, *_), (short, *_) = read(TOY), read(TOY, examples=5)
    assert short.task.test == whole.task.test[:5]


# Super-NaturalInstructions


@pytest.fixture(scope="module")
def sample(shared):
    return SuperNITasks(
        suite="superni", folder=str(shared / "data" / "superni_sample"), fold="test"
    )


@pytest.mark.parametrize("seed", [13, 42])
def test_real_superni_tasks_are_the_rows_of_their_seed(sample, seed):
    tasks = read(sample, seed=seed)
    check_promises(tasks, seed=seed)
    wanted = replace(sample, seed=seed).read_tasks(Intake())
    assert [one.task for one in tasks] == wanted
    assert all(one.draw(0) == one.draw(7) == one.task.train for one in tasks)


def test_real_superni_test_rows_are_the_same_for_every_seed(sample):
    for one, other in zip(read(sample, seed=13), read(sample, seed=58), strict=True):
        assert one.task.test == other.task.test
        assert set(one.task.train) != set(other.task.train)
        assert set(one.task.validation) != set(other.task.validation)


def test_fewer_superni_shots_are_the_first_of_the_seed(sample):
    for one, whole in zip(read(sample, seed=13, count=32), read(sample, seed=13), strict=True):
        assert one.task.train == whole.task.train[:32]
        assert one.task.validation == whole.task.validation


def test_a_superni_shot_keeps_all_its_references(tmp_path):
    (one,) = read(write_superni(tmp_path))
    assert one.n_rows == 15
    assert all(len(example.targets) == 2 for example in one.draw(0))


# JSON lines


@pytest.mark.parametrize("seed", [0, 42, -1, 2**40])
def test_rows_of_users_are_drawn_by_the_seed(tmp_path, seed):
    config = write_jsonl(tmp_path, train=50, validation=3, test=2)
    tasks = read(config, seed=seed, count=10)
    check_promises(tasks, seed=seed)
    (one,), (whole,), (other,) = tasks, read(config, seed=seed), read(config, seed=seed + 1)
    assert one.n_rows == 10
    assert one.task.train == whole.task.train[:10]
    assert sorted(ids(whole.task.train)) == sorted(ids(other.task.train))
    assert ids(whole.task.train) != ids(other.task.train)
    assert ids(one.task.validation) == ["validation:1", "validation:2", "validation:3"]
    assert one.task.test == other.task.test
    assert len(one.task.test) == 2


def test_a_row_under_several_prompts_is_one_shot_and_every_epoch_draws_a_prompt(tmp_path):
    rows = [
        {"id": str(n), "prompt": prompt, "input": f"{prompt} {n}", "target": "y"}
        for prompt in "abc"
        for n in range(30)
    ]
    write_rows(tmp_path / "t" / "train.jsonl", *rows)
    write_rows(tmp_path / "t" / "test.jsonl", {"id": "u/v", "input": "x", "target": "y"})
    config = JsonlTasks(suite="jsonl", folder=str(tmp_path), validation_examples=0)
    (one,) = read(config, count=6, set_aside=2)
    assert one.n_rows == len(one.draw(0)) == 4
    assert len(one.task.train) == 4 * 3
    assert {row.prompt for number in range(5) for row in one.draw(number)} == {"a", "b", "c"}
    assert len({row.raw_id for row in (*one.draw(3), *one.selection)}) == 6
    (test,) = one.task.test
    assert (test.prompt, test.raw_id) == ("", "u/v")


def test_only_the_tasks_that_are_named_are_read(tmp_path):
    for name in ("one", "two"):
        write_rows(tmp_path / name / "train.jsonl", {"input": "x", "target": "y"})
    write_rows(tmp_path / "three" / "train.jsonl", {"input": "x", "choices": "broken"})
    config = JsonlTasks(suite="jsonl", folder=str(tmp_path), tasks=("two",))
    assert [task.name for task in config.read_tasks(Intake())] == ["two"]
    with pytest.raises(DataError, match=r"tasks\.tasks: no task 'tow' .*did you mean 'two'"):
        replace(config, tasks=("tow",)).read_tasks(Intake())


def test_validation_rows_that_count_as_test_rows_are_not_validation_too(tmp_path):
    config = write_jsonl(tmp_path, train=50, validation=3)
    (one,) = read(config, examples=2)
    assert ids(one.task.test) == ["validation:1", "validation:2"]
    assert one.task.validation == ()
    ((task,), _) = read_evaluation(config, examples=2)
    assert (task.test, task.validation) == (one.task.test, ())


def test_rows_set_aside_of_the_training_rows_are_the_same_for_every_seed(tmp_path):
    config = write_jsonl(tmp_path, train=50)
    (one,), (other,) = read(config, seed=1), read(config, seed=2)
    assert one.task.test == other.task.test
    assert len(one.task.test) == 4
    assert not set(one.task.test) & set(one.task.train)


def test_a_task_without_test_rows_says_which_file_to_add(tmp_path):
    config = write_jsonl(tmp_path, train=5)
    with pytest.raises(DataError, match=r"task t: no test row and no held-out .*a test\.jsonl in"):
        read(config)


def test_a_task_without_training_rows_is_an_error(tmp_path):
    config = write_jsonl(tmp_path, test=5)
    with pytest.raises(DataError, match="no training example in task t"):
        read(config)
