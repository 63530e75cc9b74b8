"""The T0 mixtures from raw rows: made-up rows of real data sets under the real templates."""

import logging

import pytest
from prompted_rows import (
    AG_NEWS,
    BASED_ON,
    CLASSIFY,
    DBERT,
    NEWS,
    QUESTIONS,
    configure,
    read,
    write,
    write_templates,
)

from mhr_scale.config import IntakeConfig
from mhr_scale.errors import DataError
from mhr_scale.tasks.suites import open_suite
from mhr_scale.tasks.task import Intake

ABBREVIATION = "trec_fine_grained_ABBR"

TREC = [
    {"text": "What does NASA stand for?", "label-coarse": 2, "label-fine": 3},
    {"text": "Who wrote Hamlet?", "label-coarse": 3, "label-fine": 29},
    {"text": "What is the abbreviation of Texas?", "label-coarse": 2, "label-fine": 34},
]


# -- tasks -------------------------------------------------------------------------------------


def test_every_prompt_of_a_data_set_becomes_a_task_with_its_name_in_p3(templates, tmp_path):
    write(tmp_path, "ag_news", NEWS)
    write(tmp_path, "adversarial_qa/dbert", QUESTIONS)
    tasks = read(templates, tmp_path, "ag_news", "adversarial_qa_dbert")
    assert [task.name for task in tasks] == sorted([*AG_NEWS, *DBERT])
    counts = {task.name: (len(task.train), task.cap) for task in tasks}
    assert {counts[name] for name in AG_NEWS} == {(5, 500_000 // 7)}
    assert {counts[name] for name in DBERT} == {(3, 10_000)}


def test_a_row_is_rendered_with_its_choices_and_label(templates, tmp_path):
    path = write(tmp_path, "ag_news", NEWS)
    (task,) = read(templates, tmp_path, CLASSIFY)
    example = task.train[1]
    assert example.id == "2"
    assert example.input == "News 1 of the day. \nWhat label best describes this news article?"
    assert example.targets == ("Sports",)
    assert example.choices[1] == "Sports"
    assert (len(example.choices), example.label) == (4, 1)
    assert str(example.place) == f"{path}:2"
    assert task.metric == "accuracy"


def test_a_prompt_without_choices_has_a_target_alone(templates, tmp_path):
    write(tmp_path, "adversarial_qa/dbert", QUESTIONS)
    (task,) = read(templates, tmp_path, BASED_ON)
    example = task.train[0]
    assert "Context: River 0 flows north." in example.input
    assert example.targets[0] in QUESTIONS[0]["answers"]["text"]
    assert (example.choices, example.label, task.metric) == ((), None, "rougeL")


def test_a_held_out_row_of_a_data_set_is_trained_on_under_none_of_its_prompts(templates, tmp_path):
    write(tmp_path, "adversarial_qa/dbert", QUESTIONS * 20)
    (task,) = read(
        templates, tmp_path, "adversarial_qa_dbert", unit="dataset", validation_examples=100
    )
    train, validation = ({row.raw_id for row in rows} for rows in (task.train, task.validation))
    assert (len(train), len(validation)) == (54, 6)
    assert not train & validation
    assert len(task.validation) == 6 * len(DBERT)


def test_random_wordings_follow_from_the_seed(templates, tmp_path):
    write(tmp_path, "adversarial_qa/dbert", QUESTIONS * 20)

    def answers(seed):
        (task,) = read(templates, tmp_path, BASED_ON, seed=seed)
        return [example.targets for example in task.train]

    assert answers(1) == answers(1) != answers(2)


def test_a_data_set_as_the_unit_holds_all_its_prompts_under_different_ids(templates, tmp_path):
    write(tmp_path, "ag_news", NEWS)
    write(tmp_path, "adversarial_qa/dbert", QUESTIONS)
    tasks = read(templates, tmp_path, "ag_news", "adversarial_qa_dbert", unit="dataset")
    assert [task.name for task in tasks] == ["adversarial_qa_dbert", "ag_news"]
    news = tasks[1].train
    assert len({example.id for example in news}) == len(news) == 5 * len(AG_NEWS)
    assert news[0].id == "1/classify"


def test_every_variable_is_cut(templates, tmp_path):
    write(tmp_path, "ag_news", [{"text": "word " * 1000, "label": 0}])
    lengths = [
        len(read(templates, tmp_path, CLASSIFY, **settings)[0].train[0].input)
        for settings in ({"max_characters": 100}, {}, {"max_characters": None})
    ]
    assert lengths[0] < 200 < 2000 < lengths[1] < 2200 < 5000 < lengths[2]


# -- how many rows -----------------------------------------------------------------------------


def test_max_rows_counts_raw_rows(templates, tmp_path):
    write(tmp_path, "trec", TREC)
    (task,) = read(templates, tmp_path, ABBREVIATION, max_rows=2)
    assert [example.id for example in task.train] == ["1"]


# -- empty renders -----------------------------------------------------------------------------


def test_a_row_the_template_is_not_for_is_dropped_and_counted(templates, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="mhr_scale")
    write(tmp_path, "trec", TREC)
    intake = Intake()
    (task,) = read(templates, tmp_path, ABBREVIATION, intake=intake)
    assert [example.id for example in task.train] == ["1", "3"]
    assert (intake.taken, intake.rejects, task.metric) == (2, [], "accuracy")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{ABBREVIATION}: 1 of 3 rows render empty, dropped"]


def test_a_row_the_template_is_not_for_is_trained_on_as_a_placeholder(templates, tmp_path):
    write(tmp_path, "trec", TREC)
    intake = Intake()
    (task,) = read(templates, tmp_path, ABBREVIATION, empty_render="placeholder", intake=intake)
    texts = [(example.input, example.targets) for example in task.train]
    assert texts[1] == ("<NO INPUT>", ("<NO LABEL>",))
    assert [bool(example.choices) for example in task.train] == [True, False, True]
    assert (intake.taken, intake.rejects, task.metric) == (3, [], "rougeL")


def test_a_prompt_that_renders_nothing_is_an_error(templates, tmp_path):
    write(tmp_path, "trec", TREC[1:2])
    with pytest.raises(DataError, match=f"no usable row for {ABBREVIATION} .*1 render empty"):
        read(templates, tmp_path, ABBREVIATION)


# -- unusable rows -----------------------------------------------------------------------------


def test_a_row_without_a_field_is_refused_with_file_and_line(templates, tmp_path):
    path = write(tmp_path, "ag_news", [*NEWS, {"label": 1}])
    intake = Intake()
    (task,) = read(templates, tmp_path, CLASSIFY, intake=intake)
    (reject,) = intake.rejects
    assert (str(reject.place), reject.task) == (f"{path}:6", CLASSIFY)
    assert "'text' is undefined" in reject.reason
    assert reject.text == '{"label": 1}'
    assert len(task.train) == intake.taken == 5


def test_a_malformed_line_costs_only_itself(templates, tmp_path):
    path = write(tmp_path, "ag_news", NEWS)
    with open(path, "a") as file:
        file.write("{'text'\n")
    intake = Intake()
    (task,) = read(templates, tmp_path, CLASSIFY, intake=intake)
    (reject,) = intake.rejects
    assert (len(task.train), str(reject.place)) == (5, f"{path}:6")
    assert reject.reason.startswith("malformed JSON")


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ("yes ||| {{label}}", "target 'no' is not among the choices"),
        ("no", "fewer than two choices"),
    ],
)
def test_a_target_must_be_one_of_several_choices(tmp_path, choices, reason):
    made = write_templates(tmp_path / "templates", "{{text}} ||| no", choices)
    path = write(tmp_path / "rows", "ag_news", NEWS[:1])
    intake = Intake()
    with pytest.raises(DataError, match=f"no usable row .*{path}:1: {reason}"):
        read(made, tmp_path / "rows", CLASSIFY, intake=intake)
    assert [one.reason for one in intake.rejects] == [reason]


def test_the_first_bad_row_stops_the_suite_on_demand(templates, tmp_path):
    path = write(tmp_path, "ag_news", [*NEWS, {"label": 1}])
    with pytest.raises(DataError, match=f"{path}:6: .*'text' is undefined"):
        read(templates, tmp_path, CLASSIFY, intake=Intake(on_bad="error"))


@pytest.mark.parametrize(("policy", "count"), [("reject", 1), ("keep", 2)])
def test_an_empty_input_beside_a_placeholder_is_up_to_the_policy(tmp_path, policy, count):
    made = write_templates(tmp_path / "templates", "{{text}} ||| {{label}}", None)
    write(tmp_path / "rows", "ag_news", [{"text": "", "label": 1}, {"text": "x", "label": 1}])
    intake = IntakeConfig(empty_input=policy)
    config = configure(made, tmp_path / "rows", CLASSIFY, empty_render="placeholder", intake=intake)
    (task,) = open_suite(config).tasks
    assert len(task.train) == count
