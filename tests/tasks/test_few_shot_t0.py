"""Few-shot tasks of T0's held-out tasks: real rows, and made ones."""

import pytest
from few_shot_tasks import check_promises, ids, read, write_rte
from held_out_files import RTE, RTE_TEMPLATES, configure, template, write_rows

from mhr_scale.config import HeldOutTasks, ShotsConfig
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.suites import read_few_shot
from mhr_scale.tasks.t0.held_out_rows import TASKS
from mhr_scale.tasks.t0.held_out_shots import first_shuffled
from mhr_scale.tasks.task import Intake

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


# T0's held-out tasks, real rows


@pytest.mark.parametrize("seed", [0, 42])
def test_real_shots_have_t_few_s_numbers_under_all_templates(shared, seed):
    data = shared / "data"
    config = HeldOutTasks(
        suite="t0_eval",
        folder=str(data / "t0_eval_sets"),
        templates=str(data / "promptsource_templates" / "templates"),
        anli_split="dev",
        missing="skip",
    )
    tasks = read(config, seed=seed, folder=str(data / "tfew_few_shot"))
    check_promises(tasks, seed=seed)
    assert {one.task.name: one.n_rows for one in tasks} == SHOTS_OF_T0
    assert [one.task.name for one in tasks] == [name for name in TASKS if name in SHOTS_OF_T0]
    for one in tasks:
        assert len(one.task.train) == one.n_rows * TEMPLATES_OF_T0[one.task.name]
        assert (one.task.validation, one.selection) == ((), ())


# T0's held-out tasks, made rows


def numbers(examples):
    return [int(id.partition("/")[0]) for id in ids(examples)]


def test_shots_are_drawn_from_the_train_split_where_there_are_no_files(tmp_path):
    config = write_rte(tmp_path)
    tasks = read(config, seed=5)
    check_promises(tasks, seed=5)
    assert numbers(tasks[0].draw(0)) == first_shuffled(range(40), seed=5, count=32)
    assert numbers(read(config, seed=5, count=3)[0].draw(0)) == numbers(tasks[0].draw(0))[:3]


def test_shots_get_other_templates_in_every_epoch_and_under_every_seed(tmp_path):
    config = write_rte(tmp_path, shots=32)
    (tmp_path / "shots/rte/32_shot/1_seed.jsonl").write_bytes(
        (tmp_path / "shots/rte/32_shot/0_seed.jsonl").read_bytes()
    )
    epochs = [
        one.draw(epoch)
        for seed in (0, 1)
        for one in read(config, seed=seed, folder=str(tmp_path / "shots"))
        for epoch in range(6)
    ]
    assert len({tuple(ids(epoch)) for epoch in epochs}) == 12
    assert all(numbers(epoch) == list(range(32)) for epoch in epochs)


def test_evaluation_templates_are_those_of_the_seed_of_the_shots(tmp_path):
    config = write_rte(tmp_path, seed=99)
    tests = []
    for seed in (1, 2, 3):
        wanted = configure(tmp_path, tasks=("rte",), seed=seed).read_tasks(Intake())
        tests.append(read(config, seed=seed)[0].task.test)
        assert tests[-1] == wanted[0].test
    assert len(set(tests)) == 3
    assert all(ids(test) == ids(tests[0]) for test in tests)


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
    drawn = [row for epoch in range(20) for row in one.draw(epoch)]
    assert {id.partition("/")[2] for id in ids((*one.task.train, *drawn))} == {"b"}
    assert "rte: templates left out: 'd' for 4 row(s) without genre" in caplog.text


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_t_few_s_draw_does_not_take_is_an_error(tmp_path, seed):
    with pytest.raises(ConfigError, match=rf"seed {seed} of a few-shot draw is not in 0\.\."):
        read(write_rte(tmp_path), seed=seed)


def test_a_task_without_a_train_split_is_an_error(tmp_path):
    config = write_rte(tmp_path)
    (tmp_path / "rte.train.jsonl").unlink()
    with pytest.raises(DataError, match="no rows of rte to draw shots from; add its split 'train'"):
        read(config)
