"""The mixtures of T0: their prompts and caps against the published lists, and what is read."""

import csv
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import ROOT

from mhr_scale.config import T0Tasks
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.recipe import strict_yaml
from mhr_scale.tasks.suites import open_suite
from mhr_scale.tasks.t0 import mixtures
from mhr_scale.tasks.task import Intake

PROMPT = "adversarial_qa_dbert_based_on"
LISTS = {
    "T0": "t0_train_313.txt",
    "T0+": "t0_plus_train_392.txt",
    "T0++": "t0_plusplus_train_464.txt",
}
AG_NEWS = [p.name for p in mixtures.list_prompts("T0") if p.dataset == "ag_news"]
QUAREL = [p.name for p in mixtures.list_prompts("T0") if p.dataset == "quarel"]


def write(folder, names, n_rows=3, choices=None):
    for name in names:
        (folder / name).mkdir(parents=True)
        columns = {
            "inputs_pretokenized": [f"{name} {number}" for number in range(n_rows)],
            "targets_pretokenized": ["yes"] * n_rows,
        }
        if choices:
            columns["answer_choices"] = pa.array([choices] * n_rows, pa.list_(pa.string()))
        pq.write_table(pa.table(columns), folder / name / "train-00000-of-00001.parquet")
    return str(folder)


def read(source, *tasks, **settings):
    return list(T0Tasks(suite="t0", source=source, tasks=tasks, **settings).read_tasks(Intake()))


# -- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", LISTS)
def test_the_prompts_are_those_of_the_published_lists(shared, mixture):
    listed = (shared / "data" / "t0_mixture" / LISTS[mixture]).read_text().split()
    assert [prompt.name for prompt in mixtures.list_prompts(mixture)] == listed


@pytest.mark.parametrize(
    ("mixture", "count", "n_datasets"), [("T0", 313, 38), ("T0+", 392, 48), ("T0++", 464, 54)]
)
def test_a_mixture_has_its_number_of_prompts_and_data_sets(mixture, count, n_datasets):
    prompts = mixtures.list_prompts(mixture)
    assert (len(prompts), len({prompt.dataset for prompt in prompts})) == (count, n_datasets)


@pytest.mark.parametrize(("rule", "total"), [("t_few", 10_606_443), ("t_zero", 17_277_798)])
def test_caps_add_up_to_the_published_totals(rule, total):
    assert sum(prompt.cap(rule) for prompt in mixtures.list_prompts("T0")) == total


@pytest.mark.parametrize(("rule", "column"), [("t_few", "cap_tfew"), ("t_zero", "cap_tzero")])
def test_the_cap_of_every_prompt_is_the_listed_one(shared, rule, column):
    with (shared / "data" / "t0_mixture" / "t0_tasks.csv").open(newline="") as file:
        listed = {row["task"]: int(row[column]) for row in csv.DictReader(file) if row["do_train"]}
    assert {prompt.name: prompt.cap(rule) for prompt in mixtures.list_prompts("T0++")} == listed


def test_the_rules_differ_between_half_a_million_rows_in_all_and_in_a_prompt():
    prompt = mixtures.Prompt(name="p", dataset="d", raw="d", train_size=400_000, n_prompts=10)
    assert [prompt.cap(rule) for rule in ("t_few", "t_zero", "none")] == [50_000, 400_000, None]


def test_no_prompt_is_called_like_a_data_set():
    prompts = mixtures.list_prompts("T0++")
    assert not {prompt.name for prompt in prompts} & {prompt.dataset for prompt in prompts}


def test_the_table_names_its_sources_and_their_licence():
    source = json.loads(mixtures.TABLE.read_text())["source"]
    assert all(word in source for word in ("promptsource", "t-zero", "Apache-2.0"))


def test_the_tool_writes_the_table_that_is_shipped(shared, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch" / "tools"))
    import make_t0_table

    templates = shared / "data" / "promptsource_templates" / "templates"
    sizes = shared / "data" / "t0_mixture" / "datasets.csv"
    out = tmp_path / "table.json"
    argv = ["make_t0_table.py", str(templates), str(sizes), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    make_t0_table.main()
    assert out.read_bytes() == mixtures.TABLE.read_bytes()


# -- reading -----------------------------------------------------------------------------------


def test_the_suite_reads_real_rows(shared):
    source = str(shared / "data" / "p3_fixtures" / "hub_layout")
    reading = open_suite(T0Tasks(suite="t0", source=source, tasks=(PROMPT,)))
    (task,) = reading.tasks
    assert (task.name, task.cap, task.metric) == (PROMPT, 10_000, "rougeL")
    assert (len(task.train), len(task.validation)) == (26, 2)
    assert (reading.n_tasks, reading.intake.taken, reading.intake.rejects) == (1, 28, [])


def test_tasks_are_sorted_by_name_with_their_caps(tmp_path):
    tasks = read(write(tmp_path, [*QUAREL, *AG_NEWS]), *QUAREL, *AG_NEWS)
    assert [task.name for task in tasks] == sorted([*QUAREL, *AG_NEWS])
    caps = {task.name: task.cap for task in tasks}
    assert {caps[name] for name in QUAREL} == {1941}
    assert {caps[name] for name in AG_NEWS} == {500_000 // len(AG_NEWS)}


def test_the_whole_mixture_is_read_in_the_order_of_its_list(tmp_path):
    names = [prompt.name for prompt in mixtures.list_prompts("T0")]
    tasks = read(write(tmp_path, names, n_rows=1))
    assert [task.name for task in tasks] == names


def test_a_data_set_as_the_unit_gives_thirty_eight_tasks(tmp_path):
    source = write(tmp_path, [prompt.name for prompt in mixtures.list_prompts("T0")], n_rows=2)
    tasks = read(source, unit="dataset")
    assert len(tasks) == 38
    assert sum(len(task.train) + len(task.validation) for task in tasks) == 2 * 313
    assert sum(task.cap for task in tasks) == 10_606_443


def test_a_data_set_holds_the_rows_of_all_its_prompts_under_different_ids(tmp_path):
    (task,) = read(write(tmp_path, QUAREL), "quarel", unit="dataset", validation_examples=0)
    assert task.name == "quarel"
    assert [row.input for row in task.train] == [f"{n} {row}" for n in QUAREL for row in range(3)]
    assert len({row.id for row in task.train}) == len(task.train)
    assert task.cap == 1941 * len(QUAREL)


def test_prompts_of_the_source_that_the_mixture_lacks_are_left_out(tmp_path):
    source = write(tmp_path, ["openbookqa_main_choices", *QUAREL])
    assert len(read(source, missing="skip")) == len(QUAREL)


@pytest.mark.parametrize("max_rows", [None, "cap", 1990, 20])
def test_the_first_rows_are_read_as_far_as_max_rows_says_and_the_cap_stays(tmp_path, max_rows):
    source = write(tmp_path, QUAREL[:1], n_rows=2000)
    (task,) = read(source, QUAREL[0], validation_examples=0, max_rows=max_rows)
    count = {None: 2000, "cap": 1941}.get(max_rows, max_rows)
    assert [row.input for row in task.train] == [f"{QUAREL[0]} {n}" for n in range(count)]
    assert task.cap == 1941


def test_without_a_cap_all_rows_are_read(tmp_path):
    source = write(tmp_path, QUAREL[:1], n_rows=2000)
    (task,) = read(source, QUAREL[0], cap_rule="none", max_rows="cap")
    assert len(task.train) + len(task.validation) == 2000
    assert task.cap is None


@pytest.mark.parametrize("name", ["t5_xl_p3_mhr64", "t0_11b_p3_mhr8"])
def test_the_recipes_of_the_reference_repeat_the_first_rows(name):
    recipe = strict_yaml.read(
        (ROOT / "launch" / "recipes" / f"{name}.yaml").read_text(), source=name, error=DataError
    )[0]
    assert (recipe["tasks"]["max_rows"], recipe["mixture"]) == ("cap", {"first_rows": True})


# -- validation --------------------------------------------------------------------------------


def test_validation_rows_are_set_aside_from_the_training_rows(tmp_path):
    (task,) = read(write(tmp_path, QUAREL[:1], n_rows=1500), QUAREL[0])
    train, validation = ({row.id for row in fold} for fold in (task.train, task.validation))
    assert (len(train), len(validation)) == (1400, 100)
    assert not train & validation


def test_the_rows_set_aside_follow_from_seed_and_task_alone(tmp_path):
    source = write(tmp_path, QUAREL[:2], n_rows=200)

    def chosen(*tasks, **settings):
        found = read(source, *tasks, **settings)
        return {task.name: [row.id for row in task.validation] for task in found}

    both = chosen(*QUAREL[:2])
    assert chosen(QUAREL[1]) == {QUAREL[1]: both[QUAREL[1]]}
    assert chosen(QUAREL[1], seed=1) != chosen(QUAREL[1])


# -- metric ------------------------------------------------------------------------------------


def test_a_task_whose_rows_all_have_choices_is_scored_by_accuracy(tmp_path):
    source = write(tmp_path, QUAREL[:1], choices=["no", "yes"])
    assert read(source, QUAREL[0])[0].metric == "accuracy"


def test_a_data_set_with_a_prompt_without_choices_is_scored_by_rouge(tmp_path):
    write(tmp_path, QUAREL[:1], choices=["no", "yes"])
    source = write(tmp_path, QUAREL[1:2])
    (task,) = read(source, *QUAREL[:2], unit="dataset")
    assert task.metric == "rougeL"


# -- mistakes ----------------------------------------------------------------------------------


def test_all_missing_prompts_are_named_at_once(tmp_path, caplog):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, QUAREL))
    message = str(caught.value)
    absent = [p.name for p in mixtures.list_prompts("T0") if p.name not in QUAREL]
    assert all(name in caplog.text for name in absent)
    assert f"{sorted(absent)[0]}, " in message
    assert f"{len(absent)} of 313 prompts" in message
    assert message.endswith("or set tasks.missing: skip")


def test_missing_prompts_are_skipped_on_demand_and_said(tmp_path, caplog):
    tasks = read(write(tmp_path, QUAREL[:2]), "quarel", missing="skip")
    assert [task.name for task in tasks] == QUAREL[:2]
    assert QUAREL[2] in caplog.text


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_a_source_with_none_of_the_prompts_says_what_it_has(tmp_path, missing):
    with pytest.raises(DataError, match=r"313 of 313 prompts .* there are: imdb_my_own"):
        read(write(tmp_path, ["imdb_my_own"]), missing=missing)


def test_a_prompt_without_training_rows_is_missing(tmp_path):
    source = write(tmp_path, QUAREL[:2])
    file = tmp_path / QUAREL[0] / "train-00000-of-00001.parquet"
    file.rename(file.with_name("test-00000-of-00001.parquet"))
    with pytest.raises(DataError, match=f"1 of 2 prompts without a split 'train': {QUAREL[0]}"):
        read(source, *QUAREL[:2])


def test_an_unknown_name_has_a_hint(tmp_path):
    with pytest.raises(DataError, match=r"T0 is called quarrel; did you mean 'quarel'\?"):
        read(str(tmp_path), "quarrel")


def test_a_prompt_of_a_larger_mixture_is_unknown_to_a_smaller_one(tmp_path):
    source = write(tmp_path, ["openbookqa_main_choices"])
    with pytest.raises(DataError, match="mixture T0 is called openbookqa_main_choices"):
        read(source, "openbookqa_main_choices")
    assert len(read(source, "openbookqa_main_choices", mixture="T0+")) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("max_rows", 0), ("max_characters", 0), ("validation_examples", -1)]
)
def test_a_count_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"tasks.{name}: {value} is"):
        T0Tasks(suite="t0", **{name: value})
