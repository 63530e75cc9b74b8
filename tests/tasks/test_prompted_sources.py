"""Where the raw rows of the T0 mixtures come from: folders, the hub, and what is missing."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompted_rows import (
    AG_NEWS,
    BASED_ON,
    CLASSIFY,
    DBERT,
    NEWS,
    QUESTIONS,
    read,
    write,
    write_templates,
)

from mhr_scale.config import T0Tasks
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.t0 import mixtures

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
    with pytest.raises(DataError, match=r"ag_news/train-00000-of-00001\.parquet: cannot be read"):
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
    assert not [prompt for prompt in mixtures.list_prompts("T0++") if prompt.raw.startswith("anli")]
