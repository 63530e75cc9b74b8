import json
from dataclasses import replace

import pytest
from held_out_files import RTE, RTE_TEMPLATES, configure, template, write_rows, write_templates

from mhr_scale.config import (
    HeldOutTasks,
    IntakeConfig,
    JsonlTasks,
    ShotsConfig,
    SuperNITasks,
    ToyTasks,
)
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks import toy
from mhr_scale.tasks.held_out_rows import TASKS
from mhr_scale.tasks.held_out_shots import first_shuffled
from mhr_scale.tasks.suites import read_evaluation, read_few_shot
from mhr_scale.tasks.task import Intake

TOY = ToyTasks(suite="toy", fold="held_out", train_examples=40)
SHOTS_OF_T0 = {
    "rte": 32,
    "cb": 32,
    "anli-r1": 50,
    "anli-r2": 50,
    "anli-r3": 50,
    "winogrande": 50,
    "hellaswag": 20,
    "wic": 32,
}
TEMPLATES_OF_T0 = {
    "rte": 10,
    "cb": 15,
    "anli-r1": 15,
    "anli-r2": 15,
    "anli-r3": 15,
    "winogrande": 5,
    "hellaswag": 4,
    "wic": 10,
}


def read(config, *, seed=0, examples=None, **shots):
    return read_few_shot(config, ShotsConfig(**shots), seed=seed, examples=examples)[0]


def ids(examples):
    return [example.id for example in examples]


def check_promises(tasks, *, seed):
    """What holds for the tasks of every suite."""
    names = [one.task.name for one in tasks]
    assert len(set(names)) == len(names)
    for one in tasks:
        first, second = one.draw(0), one.draw(1)
        assert one.seed == seed
        assert len(first) == len(second) == one.n_rows > 0
        assert one.draw(0) == first
        assert [row.place for row in first] == [row.place for row in second]
        assert one.task.test
        drawn = {row.id for row in (*first, *second)}
        assert drawn <= set(ids(one.task.train))


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


def test_fewer_toy_shots_are_the_first_of_more():
    assert read(TOY, count=3)[0].task.train == read(TOY)[0].task.train[:3]


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


def write_superni(folder, *, count=20, fold="test"):
    rows = [{"id": f"i{n}", "input": f"x{n}", "output": [f"y{n}", f"z{n}"]} for n in range(count)]
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    content = {"Definition": ["Add"], "Positive Examples": [], "Instances": rows}
    (folder / "tasks" / "t.json").write_text(json.dumps(content))
    (folder / "splits" / "default" / f"{fold}_tasks.txt").write_text("t\n")
    return SuperNITasks(suite="superni", folder=str(folder), fold=fold, test_examples=5)


@pytest.mark.parametrize("seed", [13, 42])
def test_real_superni_tasks_are_the_rows_of_their_seed(sample, seed):
    tasks = read(sample, seed=seed)
    check_promises(tasks, seed=seed)
    wanted = replace(sample, seed=seed).read_tasks(Intake())
    assert [one.task for one in tasks] == wanted
    assert len(tasks) == 20
    for one in tasks:
        task = one.task
        assert [len(task.train), len(task.validation), len(task.test)] == [100, 100, 100]
        assert one.draw(0) == one.draw(7) == task.train


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


def test_superni_shots_can_be_set_aside(tmp_path):
    config = write_superni(tmp_path)
    (whole,), (cut,) = read(config), read(config, set_aside=5)
    assert (cut.task.train, cut.selection) == (whole.task.train[:10], whole.task.train[10:])


# JSON lines


def write_jsonl(folder, **folds):
    for fold, count in folds.items():
        rows = ({"input": f"{fold} {number}", "target": "y"} for number in range(count))
        write_rows(folder / "t" / f"{fold}.jsonl", *rows)
    return JsonlTasks(suite="jsonl", folder=str(folder), validation_examples=4)


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


# T0's held-out tasks, real rows


@pytest.fixture(scope="module")
def t0(shared):
    data = shared / "data"
    config = HeldOutTasks(
        suite="t0_eval",
        folder=str(data / "t0_eval_sets"),
        templates=str(data / "promptsource_templates" / "templates"),
        anli_split="dev",
        missing="skip",
    )
    return config, str(data / "tfew_few_shot")


@pytest.fixture(scope="module", params=[0, 42])
def t0_tasks(request, t0):
    config, folder = t0
    return read(config, seed=request.param, folder=folder), request.param


def test_real_shots_have_t_few_s_numbers_under_all_templates(t0_tasks):
    tasks, seed = t0_tasks
    check_promises(tasks, seed=seed)
    assert {one.task.name: one.n_rows for one in tasks} == SHOTS_OF_T0
    assert [one.task.name for one in tasks] == [name for name in TASKS if name in SHOTS_OF_T0]
    for one in tasks:
        assert len(one.task.train) == one.n_rows * TEMPLATES_OF_T0[one.task.name]
        assert (one.task.validation, one.selection) == ((), ())


def test_real_shots_get_new_templates_every_epoch(t0_tasks):
    for one in t0_tasks[0]:
        epochs = [one.draw(epoch) for epoch in range(6)]
        assert len({tuple(ids(epoch)) for epoch in epochs}) == 6
        numbers = [[id.partition("/")[0] for id in ids(epoch)] for epoch in epochs]
        assert all(epoch == numbers[0] for epoch in numbers)
        assert one.draw(3) == epochs[3]


def test_real_draws_do_not_depend_on_the_order_they_are_asked_in(t0, t0_tasks):
    config, folder = t0
    tasks, seed = t0_tasks
    for one, again in zip(tasks, read(config, seed=seed, folder=folder), strict=True):
        backwards = [again.draw(epoch) for epoch in (5, 4, 3)][::-1]
        assert [one.draw(epoch) for epoch in (3, 4, 5)] == backwards
        assert one.task == again.task


def test_real_evaluation_rows_keep_one_template_for_each_seed(t0, t0_tasks):
    config, folder = t0
    tasks, seed = t0_tasks
    wanted = replace(config, seed=seed).read_tasks(Intake())
    for one, task, other in zip(tasks, wanted, read(config, seed=1, folder=folder), strict=True):
        assert one.task.test == task.test
        assert one.task.test != other.task.test
        assert ids(one.task.test) == ids(other.task.test)
        assert len(set(ids(one.task.test))) == len(one.task.test)


def test_thirty_two_shots_of_anli_are_the_first_of_t_few_s_fifty(t0):
    config, folder = t0
    names = ("anli-r1", "anli-r2", "anli-r3")
    config = replace(config, tasks=names)
    for seed in (0, 42):
        tasks = read(config, seed=seed, folder=folder, count=32)
        assert [one.task.name for one in tasks] == list(names)
        for one in tasks:
            places = [row.place for row in one.draw(0)]
            assert [place.line for place in places] == list(range(1, 33))
            assert {place.file for place in places} == {
                f"{folder}/{one.task.name}/50_shot/{seed}_seed.jsonl"
            }


# T0's held-out tasks, made rows


def write_rte(folder, *, train=40, templates=RTE_TEMPLATES, shots=None, **options):
    """Evaluation rows, and either a train split or a file of shots (then of seed 0)."""
    write_templates(folder, "super_glue", "rte", *templates)
    rows = [{**RTE, "premise": f"p{idx}", "idx": idx} for idx in range(train)]
    write_rows(folder / "rte.validation.jsonl", *({**row, "premise": "eval"} for row in rows[:9]))
    if shots:
        write_rows(folder / "shots" / "rte" / f"{shots}_shot" / "0_seed.jsonl", *rows[:shots])
    else:
        write_rows(folder / "rte.train.jsonl", *rows)
    return configure(folder, tasks=("rte",), **options)


def numbers(examples):
    return [int(id.partition("/")[0]) for id in ids(examples)]


def test_shots_are_drawn_from_the_train_split_where_there_are_no_files(tmp_path):
    config = write_rte(tmp_path)
    tasks = read(config, seed=5)
    check_promises(tasks, seed=5)
    assert numbers(tasks[0].draw(0)) == first_shuffled(range(40), seed=5, count=32)
    assert numbers(read(config, seed=5, count=3)[0].draw(0)) == numbers(tasks[0].draw(0))[:3]


def test_evaluation_templates_are_those_of_the_seed_of_the_shots(tmp_path):
    config = write_rte(tmp_path, seed=99)
    for seed in (1, 2, 3):
        wanted = configure(tmp_path, tasks=("rte",), seed=seed).read_tasks(Intake())
        assert read(config, seed=seed)[0].task.test == wanted[0].test


def test_all_templates_of_evaluation_rows_are_kept_on_request(tmp_path):
    (one,) = read(write_rte(tmp_path, templates_mode="all"))
    assert len(one.task.test) == 18


def test_shots_set_aside_are_rendered_once_like_evaluation_rows(tmp_path):
    config = write_rte(tmp_path, shots=20)
    folder = str(tmp_path / "shots")
    (one,) = read(config, folder=folder, count=20, set_aside=5)
    assert one.n_rows == 15
    assert numbers(one.draw(0)) == list(range(15))
    assert len(one.task.train) == 15 * 2
    assert ids(one.selection) == ["15", "16", "17", "18", "19"]
    rows = [{**RTE, "premise": f"p{idx}", "idx": idx} for idx in range(15, 20)]
    write_rows(tmp_path / "rte.validation.jsonl", *rows)
    (again,) = read(config, folder=folder, count=20, set_aside=5)
    assert [row.input for row in again.task.test] == [row.input for row in one.selection]


def test_only_the_rows_of_the_tasks_asked_for_are_read(tmp_path):
    config = write_rte(tmp_path)
    (tmp_path / "cb.validation.jsonl").write_text("no JSON\n")
    tasks, intake = read_few_shot(config, ShotsConfig(), seed=0, examples=None)
    assert [one.task.name for one in tasks] == ["rte"]
    assert (intake.taken, intake.rejects) == (9, [])


def test_a_shot_that_fails_under_a_template_is_an_error_before_training(tmp_path):
    bad = template("d", "{{premise}} ||| {{'maybe' if premise == 'p3' else answer_choices[label]}}")
    config = write_rte(tmp_path, templates=(*RTE_TEMPLATES, bad), shots=8)
    folder = str(tmp_path / "shots")
    message = r"0_seed\.jsonl:4: template 'd': target 'maybe' is not a choice; mend the row"
    with pytest.raises(DataError, match=message):
        read(config, folder=folder, count=8)
    (one,) = read(config, folder=folder, count=3)
    assert len(one.task.train) == 9


def test_templates_that_no_shot_has_the_fields_of_are_left_out_with_a_warning(tmp_path, caplog):
    other = template("d", "{{genre}} {{premise}} ||| {{answer_choices[label]}}")
    config = write_rte(tmp_path, templates=(RTE_TEMPLATES[0], other))
    (one,) = read(config, count=4, set_aside=1)
    assert {id.partition("/")[2] for id in ids(one.task.train)} == {"b"}
    assert "rte: templates left out: 'd' for 4 row(s) without genre" in caplog.text


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_t_few_s_draw_does_not_take_is_an_error(tmp_path, seed):
    with pytest.raises(ConfigError, match=rf"seed {seed} of a few-shot draw is not in 0\.\."):
        read(write_rte(tmp_path), seed=seed)


def test_a_task_without_shots_is_an_error(tmp_path):
    config = write_rte(tmp_path)
    (tmp_path / "shots").mkdir()
    with pytest.raises(DataError, match="no few-shot files of rte"):
        read(config, folder=str(tmp_path / "shots"))
    (tmp_path / "rte.train.jsonl").unlink()
    with pytest.raises(DataError, match="no rows of rte to draw shots from"):
        read(config)


# Refusals


def test_training_tasks_are_no_few_shot_tasks(tmp_path):
    with pytest.raises(ConfigError, match=r"tasks\.fold: train .*toy are fold: held_out"):
        read(ToyTasks(suite="toy"))
    with pytest.raises(ConfigError, match=r"tasks\.fold: train .*superni are fold: test"):
        read(write_superni(tmp_path, fold="train"))


def test_a_superni_row_per_reference_is_an_error():
    config = SuperNITasks(suite="superni", folder="none", fold="test", references="all")
    with pytest.raises(ConfigError, match=r"tasks\.references: all .*protocol\.references"):
        read(config)


@pytest.mark.parametrize("config", [TOY, SuperNITasks(suite="superni", folder="x", fold="test")])
def test_a_folder_of_shots_is_for_t0_only(config):
    with pytest.raises(ConfigError, match=r"shots\.folder: here .*t0_eval; suite (toy|superni)"):
        read(config, folder="here")


def test_more_shots_than_there_are_is_an_error(tmp_path):
    message = "task {}: {} training rows cannot fill 60 shots; lower shots.count or {}"
    with pytest.raises(DataError, match=message.format(".*", 40, "raise tasks.train_examples")):
        read(TOY, count=60)
    with pytest.raises(DataError, match=message.format("t", 15, "raise tasks.train_examples")):
        read(write_superni(tmp_path / "superni"), count=60)
    with pytest.raises(DataError, match=message.format("t", 46, "add rows to its train.jsonl")):
        read(write_jsonl(tmp_path / "jsonl", train=50), count=60)
    with pytest.raises(DataError, match="rte: 40 rows cannot fill 60 shots"):
        read(write_rte(tmp_path / "rte"), count=60)


def test_shots_that_are_all_set_aside_are_an_error(tmp_path):
    message = "task {}: {} shots and shots.set_aside {} leave none to train on"
    with pytest.raises(DataError, match=message.format(".*", 40, 40)):
        read(TOY, set_aside=40)
    with pytest.raises(DataError, match=message.format("t", 15, 16)):
        read(write_superni(tmp_path / "superni"), set_aside=16)
    with pytest.raises(DataError, match=message.format("rte", 32, 32)):
        read(write_rte(tmp_path / "rte"), set_aside=32)


def test_superni_validation_rows_never_count_as_test_rows(tmp_path):
    config = replace(write_superni(tmp_path), test_examples=0)
    with pytest.raises(DataError, match=r"task t: no test row to .*raise tasks\.test_examples"):
        read(config, count=5)


def test_refused_rows_are_gathered_and_too_many_are_an_error(tmp_path):
    config = write_jsonl(tmp_path, train=5, test=5)
    with (tmp_path / "t" / "train.jsonl").open("a") as lines:
        lines.write('{"input": "x"}\n')
    tasks, intake = read_few_shot(config, ShotsConfig(), seed=0, examples=None)
    assert (tasks[0].n_rows, intake.taken) == (5, 10)
    assert [reject.reason for reject in intake.rejects] == ["missing field 'target'"]
    with pytest.raises(DataError, match="missing field 'target'"):
        read(replace(config, intake=IntakeConfig(on_bad="error")))
    with (tmp_path / "t" / "train.jsonl").open("a") as lines:
        lines.write('{"input": "x"}\n' * 10)
    with pytest.raises(DataError, match="11 of 21 rows refused"):
        read(config)
