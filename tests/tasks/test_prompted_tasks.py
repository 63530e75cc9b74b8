"""The T0 mixtures from raw rows: made-up rows of real data sets under the real templates."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mhr_scale.config import IntakeConfig, T0Tasks
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks import t0
from mhr_scale.tasks.suites import open_suite
from mhr_scale.tasks.task import Intake

AG_NEWS = [p.name for p in t0.list_prompts("T0") if p.dataset == "ag_news"]
DBERT = [p.name for p in t0.list_prompts("T0") if p.dataset == "adversarial_qa_dbert"]
QUAREL = [p.name for p in t0.list_prompts("T0") if p.dataset == "quarel"]
CLASSIFY, BASED_ON = "ag_news_classify", "adversarial_qa_dbert_based_on"
ABBREVIATION = "trec_fine_grained_ABBR"

NEWS = [{"text": f"News {n} of the day.", "label": n % 4} for n in range(5)]
QUESTIONS = [
    {
        "id": f"id{n}",
        "title": "Rivers",
        "context": f"River {n} flows north.",
        "question": f"Where does river {n} flow?",
        "answers": {"text": ["north", "to the north"], "answer_start": [14, 14]},
        "metadata": {"split": "train", "model_in_the_loop": "BERT"},
    }
    for n in range(3)
]
TREC = [
    {"text": "What does NASA stand for?", "label-coarse": 2, "label-fine": 3},
    {"text": "Who wrote Hamlet?", "label-coarse": 3, "label-fine": 29},
    {"text": "What is the abbreviation of Texas?", "label-coarse": 2, "label-fine": 34},
]


@pytest.fixture
def templates(shared):
    folder = shared / "data" / "promptsource_templates" / "templates"
    if not folder.is_dir():
        pytest.skip(f"no templates in {folder}")
    return str(folder)


def write(folder, data_set, rows):
    path = folder / data_set / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def configure(templates, source, *tasks, **settings):
    return T0Tasks(suite="t0", templates=templates, source=str(source), tasks=tasks, **settings)


def read(templates, source, *tasks, intake=None, **settings):
    settings.setdefault("validation_examples", 0)
    config = configure(templates, source, *tasks, **settings)
    return list(config.read_tasks(Intake() if intake is None else intake))


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


def test_validation_rows_are_set_aside(templates, tmp_path):
    write(tmp_path, "ag_news", NEWS * 8)
    (task,) = read(templates, tmp_path, CLASSIFY, validation_examples=100)
    assert (len(task.train), len(task.validation)) == (36, 4)


# -- how many rows -----------------------------------------------------------------------------


@pytest.mark.parametrize(("max_rows", "count"), [(None, 2000), ("cap", 1941), (1990, 1990), (3, 3)])
def test_rows_are_read_as_far_as_max_rows_says(templates, tmp_path, max_rows, count):
    row = {"question": "Is it (A) hot or (B) cold?", "answer_index": 0, "world_literals": None}
    row["world_literals"] = {"world1": ["hot"], "world2": ["cold"]}
    write(tmp_path, "quarel", [row] * 2000)
    (task,) = read(templates, tmp_path, QUAREL[0], max_rows=max_rows)
    assert (len(task.train), task.cap) == (count, 1941)


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


def write_templates(folder, jinja, choices):
    """Write the templates of ag_news, each of them being the same text."""
    names = [name.removeprefix("ag_news_") for name in AG_NEWS]
    blocks = "".join(
        f"  {name}: !Template\n    answer_choices: {json.dumps(choices)}\n    id: {name}\n"
        f"    jinja: {json.dumps(jinja)}\n    name: {name}\n"
        for name in names
    )
    path = folder / "ag_news" / "templates.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"dataset: ag_news\ntemplates:\n{blocks}")
    return str(folder)


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


def test_too_many_bad_rows_stop_the_suite(templates, tmp_path):
    write(tmp_path, "ag_news", [*NEWS, *[{"label": 1}] * 11])
    reading = open_suite(configure(templates, tmp_path, CLASSIFY))
    assert len(list(reading.tasks)) == 1
    with pytest.raises(DataError, match="11 of 16 rows refused"):
        reading.intake.check()


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


# -- layouts -----------------------------------------------------------------------------------


def write_parquet(folder, rows, n_shards=2):
    folder.mkdir(parents=True)
    for number in range(n_shards):
        part = rows[number * len(rows) // n_shards : (number + 1) * len(rows) // n_shards]
        name = f"train-{number:05}-of-{n_shards:05}.parquet"
        pq.write_table(pa.Table.from_pylist(part), folder / name)


def save(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


def save_all(folder, rows):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder))


@pytest.mark.parametrize("lay", [write_parquet, save, save_all])
@pytest.mark.parametrize(
    ("data_set", "rows", "prompt"),
    [("ag_news", NEWS, CLASSIFY), ("adversarial_qa/dbert", QUESTIONS, BASED_ON)],
)
def test_the_layouts_give_the_same_examples(templates, tmp_path, lay, data_set, rows, prompt):
    write(tmp_path / "jsonl", data_set, rows)
    lay(tmp_path / "other" / data_set, rows)

    def examples(folder):
        (task,) = read(templates, tmp_path / folder, prompt)
        return [(e.id, e.input, e.targets, e.choices, e.label) for e in task.train]

    assert examples("other") == examples("jsonl")
    assert len(examples("jsonl")) == len(rows)


def test_rows_of_a_table_have_a_place(templates, tmp_path):
    write_parquet(tmp_path / "ag_news", NEWS)
    (task,) = read(templates, tmp_path, CLASSIFY)
    shard = tmp_path / "ag_news" / "train-00001-of-00002.parquet"
    assert str(task.train[2].place) == f"{shard}:1"


def test_a_missing_shard_is_an_error(templates, tmp_path):
    write_parquet(tmp_path / "ag_news", NEWS)
    (tmp_path / "ag_news" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: the shard is missing"):
        read(templates, tmp_path, CLASSIFY)
    assert len(read(templates, tmp_path, CLASSIFY, max_rows=2)[0].train) == 2


def test_a_damaged_shard_is_an_error(templates, tmp_path):
    write_parquet(tmp_path / "ag_news", NEWS, n_shards=1)
    (tmp_path / "ag_news" / "train-00000-of-00001.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="ag_news: cannot be read"):
        read(templates, tmp_path, CLASSIFY)


def test_two_layouts_of_a_data_set_are_an_error(templates, tmp_path):
    write_parquet(tmp_path / "ag_news", NEWS)
    write(tmp_path, "ag_news", NEWS)
    with pytest.raises(DataError, match=r"train.jsonl and train-\*.parquet; keep one"):
        read(templates, tmp_path, CLASSIFY)


# -- the hub -----------------------------------------------------------------------------------


def test_a_data_set_of_the_hub_is_streamed_by_its_name(templates, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names, **settings):
        asked.append((names, settings))
        return datasets.Dataset.from_list(QUESTIONS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks = read(templates, "hub", "adversarial_qa_dbert")
    assert asked == [(("adversarial_qa", "dbert"), {"split": "train", "streaming": True})]
    assert [(task.name, len(task.train)) for task in tasks] == [(name, 3) for name in DBERT]
    assert str(tasks[0].train[1].place) == "adversarial_qa/dbert/train:2"


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_what_the_hub_does_not_give_is_missing(templates, monkeypatch, caplog, missing):
    def load_dataset(name, subset, **settings):
        if name != "ag_news":
            raise RuntimeError("Dataset scripts are no longer supported")
        return datasets.Dataset.from_list(NEWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = (CLASSIFY, BASED_ON)
    if missing == "error":
        with pytest.raises(DataError, match=r"1 of 2 data sets .*: adversarial_qa/dbert; add"):
            read(templates, "hub", *names)
    else:
        assert [task.name for task in read(templates, "hub", *names, missing="skip")] == [CLASSIFY]
    assert "Dataset scripts are no longer supported" in caplog.text


# -- mistakes ----------------------------------------------------------------------------------


def test_all_missing_data_sets_are_named_at_once(templates, tmp_path, caplog):
    write(tmp_path, "ag_news", NEWS)
    with pytest.raises(DataError) as caught:
        read(templates, tmp_path)
    absent = {prompt.raw for prompt in t0.list_prompts("T0")} - {"ag_news"}
    assert f"{len(absent)} of 38 data sets" in str(caught.value)
    assert all(name in caplog.text for name in absent)


def test_missing_data_sets_are_skipped_on_demand(templates, tmp_path, caplog):
    write(tmp_path, "ag_news", NEWS)
    tasks = read(templates, tmp_path, CLASSIFY, BASED_ON, missing="skip")
    assert [task.name for task in tasks] == [CLASSIFY]
    assert "adversarial_qa/dbert" in caplog.text


def test_a_folder_without_any_data_set_says_what_was_looked_for(templates, tmp_path):
    with pytest.raises(DataError, match=r"1 of 1 data sets .* looked for <dataset>\[/<subset>\]"):
        read(templates, tmp_path, CLASSIFY, missing="skip")


def test_prompts_without_a_template_are_named_at_once(templates, tmp_path):
    made = write_templates(tmp_path / "templates", "{{text}} ||| {{label}}", None)
    path = tmp_path / "templates" / "ag_news" / "templates.yaml"
    path.write_text(path.read_text().replace("name: classify\n", "name: sort\n"))
    write(tmp_path / "rows", "ag_news", NEWS)
    with pytest.raises(DataError) as caught:
        read(made, tmp_path / "rows", "ag_news", BASED_ON, missing="skip")
    assert f"lacks 2 of {len(AG_NEWS) + 1} prompts: {BASED_ON}, {CLASSIFY};" in str(caught.value)


@pytest.mark.parametrize("setting", ["templates", "source"])
def test_a_folder_that_is_not_there_is_an_error(templates, tmp_path, setting):
    names = {"templates": templates, "source": str(tmp_path), setting: str(tmp_path / "nowhere")}
    with pytest.raises(DataError, match=f"tasks.{setting}: no folder '.*nowhere'"):
        read(names["templates"], names["source"], CLASSIFY)


def test_p3_cannot_be_rendered_again():
    with pytest.raises(ConfigError, match="bigscience/P3 is rendered already"):
        T0Tasks(suite="t0", templates="templates")


def test_the_mixture_has_no_prompt_of_anli():
    assert not [prompt for prompt in t0.list_prompts("T0++") if prompt.raw.startswith("anli")]
