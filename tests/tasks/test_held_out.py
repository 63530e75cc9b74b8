"""T0's held-out tasks on real sets: templates, shots, one example per row."""

import json
import logging

import pytest
from held_out_files import configure, write_rows

from mhr_scale.config import HeldOutTasks
from mhr_scale.errors import DataError
from mhr_scale.tasks.t0.held_out_prompts import Prompts
from mhr_scale.tasks.t0.held_out_rows import TASKS
from mhr_scale.tasks.task import Intake

N_TEMPLATES = {
    "rte": 10,
    "cb": 15,
    "anli-r1": 15,
    "anli-r2": 15,
    "anli-r3": 15,
    "wsc": 10,
    "winogrande": 5,
    "copa": 8,
    "hellaswag": 4,
    "storycloze": 5,
    "wic": 10,
}
N_ROWS = {
    "rte": 277,
    "cb": 56,
    "anli-r1": 200,
    "anli-r2": 200,
    "anli-r3": 200,
    "winogrande": 1267,
    "hellaswag": 398,
    "wic": 638,
}
CLOZE = [
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding",
    'a1,Jo ran.,"It, too, ran.",They met.,They spoke.,They left.,A cow flew.,2',
]


def templates_of(shared):
    return shared / "data" / "promptsource_templates" / "templates"


def configure_shared(shared, **options):
    options = {
        "folder": str(shared / "data" / "t0_eval_sets"),
        "anli_split": "dev",
        "missing": "skip",
        **options,
    }
    return HeldOutTasks(suite="t0_eval", templates=str(templates_of(shared)), **options)


def read_shared(shared, **options):
    intake = Intake(on_bad="error")
    return {task.name: task for task in configure_shared(shared, **options).read_tasks(intake)}


def read_with_shared_templates(shared, folder, task, *rows, **options):
    write_rows(folder / f"{task}.{TASKS[task].evaluation}.jsonl", *rows)
    config = configure_shared(shared, folder=str(folder), tasks=(task,), **options)
    intake = Intake()
    (made,) = config.read_tasks(intake)
    return made.test, intake


@pytest.fixture(scope="module")
def drawn(shared):
    return read_shared(shared)


@pytest.fixture(scope="module")
def every(shared):
    return read_shared(shared, templates_mode="all")


# Real rows and templates


@pytest.mark.parametrize("name", TASKS)
def test_a_task_uses_the_templates_of_t_few(shared, name):
    task = TASKS[name]
    prompts = Prompts(task, folder=templates_of(shared), max_characters=2048, seed=0)
    found = [template.name for template in prompts.templates]
    listed = json.loads((shared / "reference" / "t0_tasks.json").read_text())["test_templates"]
    assert found == listed[task.alias or name]["used"]
    assert len(found) == N_TEMPLATES[name]


def test_the_table_has_the_shots_of_t_few_and_of_mhr(shared):
    listed = json.loads((shared / "reference" / "t0_tasks.json").read_text())["few_shot"]
    for name, task in TASKS.items():
        assert task.shots == listed["tfew_shots"][task.alias or name]
        assert (task.mhr_shots or task.shots) == listed["mttl_shots"][task.alias or name]


def test_real_sets_give_one_example_per_row(drawn):
    assert {name: len(task.test) for name, task in drawn.items()} == N_ROWS
    assert all(task.train == () and task.metric == "accuracy" for task in drawn.values())
    for task in drawn.values():
        assert len({example.id for example in task.test}) == len(task.test)


def test_real_sets_give_every_template_of_every_row_on_request(every):
    expected = {name: rows * N_TEMPLATES[name] for name, rows in N_ROWS.items()}
    expected["hellaswag"] = 2 * 398 + 150
    assert {name: len(task.test) for name, task in every.items()} == expected


def test_labels_point_at_the_target_in_every_real_row(drawn, every):
    for task in (*drawn.values(), *every.values()):
        for example in task.test:
            assert example.targets == (example.choices[example.label],)
            assert len(example.choices) == TASKS[task.name].choices
            assert example.input
            assert all(example.choices)


def test_labels_are_those_of_the_rows(shared, every):
    for path in (shared / "data" / "t0_eval_sets").glob("*.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        labels = {str(row["idx"]): row["label"] for row in rows}
        for example in every[path.name.partition(".")[0]].test:
            assert example.label == labels[example.id.partition("/")[0]]


def test_a_draw_is_one_of_the_examples_of_all_templates(drawn, every):
    for name, task in drawn.items():
        inputs = {(one.id.partition("/")[0], one.input): one.id for one in every[name].test}
        names = {inputs[one.id, one.input].partition("/")[2] for one in task.test}
        assert len(names) == (3 if name == "hellaswag" else N_TEMPLATES[name])


def test_draws_do_not_depend_on_the_order_of_rows(shared, drawn, tmp_path):
    for path in (shared / "data" / "t0_eval_sets").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        (tmp_path / path.name).write_text("".join(reversed(lines[::3])))
    some = read_shared(shared, folder=str(tmp_path))
    for name, task in drawn.items():
        inputs = {example.id: example.input for example in task.test}
        assert len(some[name].test) == len(task.test[::3])
        assert all(example.input == inputs[example.id] for example in some[name].test)


def test_draws_depend_on_the_seed(shared, drawn):
    other = read_shared(shared, seed=7, tasks=("rte",))["rte"]
    changed = sum(one.input != two.input for one, two in zip(drawn["rte"].test, other.test))
    assert 0.8 * 277 < changed < 277


def test_what_real_sets_lack_is_said(shared, caplog):
    with caplog.at_level(logging.WARNING, "mhr_scale"):
        read_shared(shared)
    storycloze, skipped, hellaswag, short = [record.getMessage() for record in caplog.records]
    assert "storycloze left out" in storycloze
    assert "over 8 tasks instead of 11; name the file in tasks.storycloze" in storycloze
    assert "2 task(s) skipped, no evaluation rows: wsc (validation wanted, nothing" in skipped
    assert hellaswag == (
        "hellaswag: templates left out: 'Predict ending with hint' for 248 row(s) without "
        "activity_label; 'complete_first_then' for 398 row(s) without ctx_a, ctx_b"
    )
    assert short.endswith("anli-r1 200 of 1000, anli-r2 200 of 1000, anli-r3 200 of 1200, "
                          "hellaswag 398 of 10042")  # fmt: skip


def test_missing_tasks_are_all_listed(shared):
    config = configure_shared(shared, anli_split="test", missing="error")
    with pytest.raises(DataError) as caught:
        config.read_tasks(Intake())
    message = str(caught.value)
    assert "no evaluation rows of 5 task(s): anli-r1 (test_r1 wanted, anli-r1.dev_fi" in message
    assert "wsc (validation wanted, nothing there), copa (validation wanted, noth" in message
    assert message.endswith("tasks.anli_split or set tasks.missing: skip")


@pytest.mark.parametrize("mode", ["draw", "all"])
def test_copa_renders_both_kinds_of_question(shared, tmp_path, mode):
    rows = [
        {
            "premise": "The lamp went out.",
            "choice1": "The bulb broke.",
            "choice2": "The sun rose.",
            "question": question,
            "label": 0,
            "idx": idx,
        }
        for idx, question in enumerate(("cause", "effect"))
    ]
    examples, intake = read_with_shared_templates(
        shared, tmp_path, "copa", *rows, templates_mode=mode
    )
    assert not intake.rejects
    assert len(examples) == (2 if mode == "draw" else 16)
    assert {example.targets for example in examples} == {("The bulb broke.",)}


def test_wsc_renders_under_all_templates(shared, tmp_path):
    row = {
        "text": "Kim called Lee because she was late.",
        "span1_text": "Kim",
        "span2_text": "she",
        "span1_index": 0,
        "span2_index": 4,
        "label": 1,
        "idx": 0,
    }
    examples, _ = read_with_shared_templates(shared, tmp_path, "wsc", row, templates_mode="all")
    assert len(examples) == 10
    assert {example.targets[0] for example in examples} == {"Yes", "True"}
    (meant,) = (one for one in examples if one.id == "0/I think they mean")
    assert meant.input.endswith('I think they mean "Kim was late." Yes or no?')


def test_hellaswag_rows_of_the_hub_get_all_four_templates(shared, tmp_path):
    row = {
        "activity_label": "Skating",
        "ctx_a": "A man skates.",
        "ctx_b": "he",
        "ctx": "A man skates. he",
        "endings": ["falls.", "flies.", "sings ||| well.", "melts."],
        "label": "2",
        "ind": 4,
    }
    examples, _ = read_with_shared_templates(
        shared, tmp_path, "hellaswag", row, templates_mode="all"
    )
    assert [example.id.partition("/")[2] for example in examples] == [
        "Predict ending with hint",
        "Randomized prompts template",
        "complete_first_then",
        "if_begins_how_continues",
    ]
    assert [example.label for example in examples] == [2, 2, 2, 2]
    assert [example.targets[0] for example in examples[-2:]] == ["sings ||| well.", "Ending 3"]


@pytest.mark.parametrize("answer", ["2", 2])
def test_the_answer_of_winogrande_counts_from_one(shared, tmp_path, answer):
    row = {"sentence": "The _ fell.", "option1": "cup", "option2": "mug", "answer": answer}
    examples, intake = read_with_shared_templates(
        shared, tmp_path, "winogrande", row, {**row, "answer": ""}, templates_mode="all"
    )
    assert {(one.label, one.targets) for one in examples} == {(1, ("mug",))}
    assert [(reject.place.line, reject.reason) for reject in intake.rejects] == [
        (2, "hidden label")
    ]


# Story Cloze


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_storycloze_is_read_from_its_own_file(shared, tmp_path, caplog, kind):
    path = tmp_path / f"spring2016.{kind}"
    if kind == "csv":
        path.write_text("\n".join(CLOZE))
    else:
        names = [f"input_sentence_{number}" for number in (1, 2, 3, 4)]
        texts = ["Jo ran.", "It, too, ran.", "They met.", "They spoke."]
        ends = {"sentence_quiz1": "They left.", "sentence_quiz2": "A cow flew."}
        write_rows(path, {**dict(zip(names, texts)), **ends, "answer_right_ending": 2})
    with caplog.at_level(logging.WARNING, "mhr_scale"):
        tasks = read_shared(shared, storycloze=str(path))
    (example,) = tasks["storycloze"].test
    assert (example.id, example.label, example.choices) == ("0", 1, ("They left.", "A cow flew."))
    assert example.targets == ("A cow flew.",)
    assert "It, too, ran." in example.input
    assert "storycloze left out" not in caplog.text


def test_storycloze_lies_among_the_other_files_too(shared, tmp_path):
    names = [f"input_sentence_{number}" for number in (1, 2, 3, 4)]
    row = {**dict.fromkeys(names, "x"), "sentence_quiz1": "y", "sentence_quiz2": "z"}
    examples, _ = read_with_shared_templates(
        shared, tmp_path, "storycloze", {**row, "answer_right_ending": 1}
    )
    assert examples[0].targets == ("y",)


@pytest.mark.parametrize("options", [{}, {"source": "hub", "folder": None}])
def test_storycloze_asked_for_by_name_is_missing_like_any_other(tmp_path, options):
    place = "the hub" if options else tmp_path
    message = rf"{place}: no .* 1 task\(s\): storycloze \(test wanted, nothing there\)"
    with pytest.raises(DataError, match=message):
        configure(tmp_path, tasks=("storycloze",), **options).read_tasks(Intake())


def test_a_storycloze_path_without_a_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"tasks\.storycloze: .*none\.csv: no such file"):
        configure(tmp_path, storycloze=str(tmp_path / "none.csv")).read_tasks(Intake())


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_another_csv_file_is_not_storycloze(shared, tmp_path, text):
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(DataError, match=r"other\.csv: not StoryCloze's file, no column AnswerRig"):
        read_shared(shared, storycloze=str(tmp_path / "other.csv"))
