"""The reader of P3: real rows in every layout, how much of them is read, and the hub."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from p3_files import GOOD, read, write_lines, write_table

from mhr_scale.errors import DataError
from mhr_scale.tasks.t0 import p3

PLAIN = "adversarial_qa_dbert_based_on"
CHOSEN = "openbookqa_main_choices"
RANKED = "hellaswag_complete_first_then_score_eval"
ALL = (PLAIN, CHOSEN, RANKED, "hellaswag_if_begins_how_continues_score_eval")


def texts(examples):
    return [(row.input, row.targets, row.choices, row.label) for row in examples]


# -- real rows ---------------------------------------------------------------------------------


@pytest.fixture
def hub(shared):
    return shared / "data" / "p3_fixtures" / "hub_layout"


@pytest.fixture
def saved(shared):
    return shared / "data" / "p3_fixtures" / "arrow_save_to_disk"


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_saved_folder_gives_the_examples_of_the_hub_layout(hub, saved, config, split):
    stored, parquet = (read(folder, config, split=split) for folder in (saved, hub))
    assert texts(stored) == texts(parquet)
    assert [row.id for row in stored] == [row.id for row in parquet]


def test_a_jsonl_folder_gives_the_examples_of_the_hub_layout(hub, tmp_path):
    for config in (PLAIN, CHOSEN, RANKED):
        table = pq.read_table(hub / config / "train-00000-of-00001.parquet")
        write_lines(tmp_path, table.to_pylist(), config)
        assert texts(read(tmp_path, config)) == texts(read(hub, config))


def test_texts_are_stripped(hub):
    first = read(hub, PLAIN)[0]
    assert first.targets == ("subjective idealism",)
    assert first.input.startswith("Extract the answer")
    rows = [row for config in ALL for row in read(hub, config)]
    written = [text for row in rows for text in (row.input, *row.targets, *row.choices)]
    assert written == [text.strip() for text in written]


def test_a_row_per_example_without_choices(hub):
    rows = read(hub, PLAIN)
    assert [(row.choices, row.label) for row in rows] == [((), None)] * 28


def test_answer_choices_become_choices_and_the_target_its_label(hub):
    rows = read(hub, CHOSEN)
    assert len(rows) == 28
    assert {len(row.choices) for row in rows} == {4}
    assert all(row.targets == (row.choices[row.label],) for row in rows)
    assert rows[0].label == 3


@pytest.mark.parametrize("config", [config for config in ALL if config.endswith("_score_eval")])
def test_rows_of_choices_become_one_example_each_group(hub, config):
    table = pq.read_table(hub / config / "train-00000-of-00001.parquet").to_pylist()
    rows = read(hub, config)
    assert [row.id for row in rows] == [f"{config}/train:{number}" for number in range(7)]
    assert {len(row.choices) for row in rows} == {4}
    for number, row in enumerate(rows):
        group = table[4 * number : 4 * number + 4]
        assert row.choices == tuple(line["targets_pretokenized"].strip() for line in group)
        assert [line["is_correct"] for line in group].index(True) == row.label


def test_token_ids_are_never_read(hub, tmp_path):
    table = pq.read_table(hub / CHOSEN / "train-00000-of-00001.parquet")
    (tmp_path / CHOSEN).mkdir()
    pq.write_table(
        table.drop_columns(["inputs", "targets"]),
        tmp_path / CHOSEN / "train-00000-of-00001.parquet",
    )
    assert texts(read(tmp_path, CHOSEN)) == texts(read(hub, CHOSEN))


def test_the_library_of_the_hub_reads_the_same_rows(hub, tmp_path):
    table = load_dataset(str(hub), PLAIN, split="train", cache_dir=str(tmp_path))
    assert [row.input for row in read(hub, PLAIN)] == [
        text.strip() for text in table["inputs_pretokenized"]
    ]


def test_a_place_is_the_file_and_the_row(hub):
    place = read(hub, PLAIN)[1].place
    assert str(place) == f"{hub}/{PLAIN}/train-00000-of-00001.parquet:2"


def test_all_splits_of_a_config_are_found(hub):
    splits = p3.open_source(str(hub)).splits
    assert set(splits) == set(ALL)
    assert set(splits[RANKED]) == {"train", "validation", "test"}


# -- how much is read --------------------------------------------------------------------------


def test_only_the_first_examples_are_taken_where_a_row_is_a_choice(hub):
    assert texts(read(hub, RANKED, max_rows=2)) == texts(read(hub, RANKED)[:2])


def test_a_refused_row_counts_as_one_of_the_first(tmp_path):
    write_table(tmp_path, [GOOD, {**GOOD, "inputs_pretokenized": " "}, GOOD])
    assert len(read(tmp_path, "c", max_rows=2)) == 1


def test_shards_are_read_in_their_order(tmp_path):
    for number in (1, 0):
        row = {**GOOD, "inputs_pretokenized": f"shard {number}"}
        write_table(tmp_path, [row], file=f"train-{number:05}-of-00002.parquet")
    rows = read(tmp_path, "c")
    assert [(row.input, row.id) for row in rows] == [
        ("shard 0", "c/train:1"),
        ("shard 1", "c/train:2"),
    ]


def test_a_shard_behind_the_last_row_may_be_absent(tmp_path):
    write_table(tmp_path, [GOOD, GOOD], file="train-00000-of-00002.parquet")
    assert len(read(tmp_path, "c", max_rows=2)) == 2


def test_an_absent_shard_that_is_needed_is_named(tmp_path):
    write_table(tmp_path, [GOOD], file="train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"c/train-00001-of-00002\.parquet: the shard is missing"):
        read(tmp_path, "c")


def test_shards_of_two_sets_are_not_mixed(tmp_path):
    write_table(tmp_path, [GOOD], file="train-00000-of-00001.parquet")
    write_table(tmp_path, [GOOD], file="train-00000-of-00002.parquet")
    with pytest.raises(DataError, match="shards of several sets"):
        p3.open_source(str(tmp_path))


def test_a_split_with_the_same_beginning_is_another_split(tmp_path):
    write_table(tmp_path, [GOOD])
    write_table(tmp_path, [GOOD, GOOD], file="train_r1-00000-of-00001.parquet")
    assert [len(read(tmp_path, "c", split=split)) for split in ("train", "train_r1")] == [1, 2]


# -- the hub -----------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(hub, tmp_path, monkeypatch):
    """A hub that serves the fixture folder; returns the files that were downloaded."""
    snapshot = tmp_path / "snapshots" / "abc123"
    fetched = []

    def describe(self, name, *, revision, timeout):
        assert (name, revision) == ("bigscience/P3", "abc123")
        files = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def take_card(name, *, repo_type, allow_patterns):
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)

    def download(name, file, *, repo_type, revision):
        fetched.append(file)
        (snapshot / file).parent.mkdir(exist_ok=True)
        shutil.copy(hub / file, snapshot / file)
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", take_card)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", describe)
    return fetched


def test_the_hub_gives_the_rows_of_the_folder_and_only_the_wanted_file_is_fetched(fake_hub, hub):
    assert texts(read("bigscience/P3", PLAIN)) == texts(read(hub, PLAIN))
    assert fake_hub == [f"{PLAIN}/train-00000-of-00001.parquet"]


def test_a_row_of_the_hub_is_named_by_the_hub(fake_hub):
    place = read("bigscience/P3", PLAIN)[0].place
    assert str(place) == f"bigscience/P3/{PLAIN}/train-00000-of-00001.parquet:1"


def test_what_the_hub_gave_before_is_read_without_it(fake_hub, hub, monkeypatch, caplog):
    read("bigscience/P3", PLAIN)

    def describe(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", describe)
    assert texts(read("bigscience/P3", PLAIN)) == texts(read(hub, PLAIN))
    assert "no hub" in caplog.text


def test_a_download_that_fails_is_named(fake_hub, monkeypatch):
    def download(*args, **options):
        raise OSError("disk full\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"does not give it \(OSError: disk full\); start again"):
        read("bigscience/P3", PLAIN)


def test_a_hub_that_cannot_be_reached_is_one_error(monkeypatch):
    def download(*args, **options):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = r"tasks.source: 'bigscience/P3' is no local folder .* \(OSError: no network\); give"
    with pytest.raises(DataError, match=message):
        p3.open_source("bigscience/P3", setting="tasks.source")
