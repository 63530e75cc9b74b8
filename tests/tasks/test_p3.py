"""The reader of P3: column sets and layouts on real rows, bad input on made-up ones."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset

from mhr_scale.config import IntakeConfig
from mhr_scale.errors import DataError
from mhr_scale.tasks import p3
from mhr_scale.tasks.task import Intake

PLAIN = "adversarial_qa_dbert_based_on"
CHOSEN = "openbookqa_main_choices"
RANKED = "hellaswag_complete_first_then_score_eval"
ALL = (PLAIN, CHOSEN, RANKED, "hellaswag_if_begins_how_continues_score_eval")
GOOD = {"inputs_pretokenized": "\nask\n", "targets_pretokenized": "\nyes\n"}
WITH_CHOICES = {**GOOD, "answer_choices": ["no ", "yes"]}


def ranked(example, choice, *, is_correct=False, **other):
    return {
        "inputs_pretokenized": f"ask {example}",
        "targets_pretokenized": f"choice {choice}",
        "idx": [example, choice],
        "is_correct": is_correct,
        **other,
    }


GROUP = [ranked(0, 0), ranked(0, 1, is_correct=True)]


def read(folder, config, *, split="train", max_rows=None, intake=None, **policy):
    return p3.read_examples(
        p3.open_source(str(folder)),
        config,
        split=split,
        max_rows=max_rows,
        policy=IntakeConfig(**policy),
        intake=intake or Intake(),
    )


def write_table(folder, rows, config="c", file="train-00000-of-00001.parquet", **types):
    (folder / config).mkdir(exist_ok=True)
    columns = {key: pa.array([row[key] for row in rows], types.get(key)) for key in rows[0]}
    pq.write_table(pa.table(columns), folder / config / file)
    return folder


def write_lines(folder, rows, config="c", file="train.jsonl"):
    (folder / config).mkdir(exist_ok=True)
    (folder / config / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def refused(folder, config="c", **options):
    """The reason why the one bad row of a folder, which holds good ones too, was refused."""
    intake = Intake()
    read(folder, config, intake=intake, **options)
    (reject,) = intake.rejects
    assert reject.task == config
    return reject.reason


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


def test_only_the_first_rows_are_read(hub):
    assert texts(read(hub, PLAIN, max_rows=5)) == texts(read(hub, PLAIN)[:5])


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


# -- which folder ------------------------------------------------------------------------------


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"nothing of P3 here; looked for .*dataset_dict\.json"):
        p3.open_source(str(tmp_path))


def test_the_folder_of_one_config_is_not_a_source(tmp_path):
    write_table(tmp_path, [GOOD])
    with pytest.raises(DataError, match="looked for"):
        p3.open_source(str(tmp_path / "c"))


def test_two_layouts_in_one_folder_are_ambiguous(tmp_path):
    write_table(tmp_path, [GOOD])
    write_lines(tmp_path, [GOOD], config="d")
    with pytest.raises(DataError, match=r"side by side \(jsonl, parquet\)"):
        p3.open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such", "./none", "none", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(DataError, match=f"tasks.source: no folder '{name}'"):
        p3.open_source(name, setting="tasks.source")


def test_hidden_folders_are_passed_over(tmp_path):
    write_table(tmp_path, [GOOD])
    write_lines(tmp_path, [GOOD], config=".cache")
    assert set(p3.open_source(str(tmp_path)).splits) == {"c"}


def test_a_saved_folder_without_its_list_of_splits_is_named(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match=r"c/dataset_dict\.json: no list of splits"):
        p3.open_source(str(tmp_path))


def test_a_saved_split_that_is_absent_is_named(tmp_path):
    DatasetDict(train=Dataset.from_list([GOOD])).save_to_disk(str(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c" / "train")
    with pytest.raises(DataError, match=r"c/train: cannot be read \(FileNotFoundError"):
        read(tmp_path, "c")


def test_a_torn_table_is_named(tmp_path):
    write_table(tmp_path, [GOOD])
    file = tmp_path / "c" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: cannot be read \(Arrow"):
        read(tmp_path, "c")


# -- columns -----------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_those_found_and_expected(tmp_path):
    write_table(tmp_path, [{"inputs_pretokenized": "x", "target": "y"}])
    message = (
        r"config c lacks targets_pretokenized; expected the columns inputs_pretokenized, "
        r"targets_pretokenized, found inputs_pretokenized, target"
    )
    with pytest.raises(DataError, match=message):
        read(tmp_path, "c")


def test_a_config_of_choices_needs_their_columns(tmp_path):
    write_table(tmp_path, [GOOD], config="c_score_eval")
    with pytest.raises(DataError, match=r"c_score_eval lacks idx, is_correct; expected .* found"):
        read(tmp_path, "c_score_eval")


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("inputs_pretokenized", 5, "integers, expected text"),
        ("targets_pretokenized", ["y"], "list of text, expected text"),
        ("answer_choices", "yes|||no", "text, expected list of text"),
        ("answer_choices", [1, 2], "list of integers, expected list of text"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, column, value, found):
    write_table(tmp_path, [{**GOOD, column: value}])
    with pytest.raises(DataError, match=f"column {column} is {found}"):
        read(tmp_path, "c")


def test_pairs_of_a_fixed_length_are_pairs(tmp_path):
    write_table(tmp_path, GROUP, config="c_score_eval", idx=pa.list_(pa.int32(), 2))
    assert len(read(tmp_path, "c_score_eval")) == 1


@pytest.mark.parametrize("choices", [None, []])
def test_a_column_of_choices_may_be_empty(tmp_path, choices):
    write_table(tmp_path, [{**GOOD, "answer_choices": choices}])
    assert read(tmp_path, "c")[0].choices == ()


# -- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs_pretokenized": " \n"}, "empty input"),
        ({"targets_pretokenized": "\n"}, "empty target"),
        ({"inputs_pretokenized": None}, "'inputs_pretokenized' is null, expected a string"),
        ({"answer_choices": ["no", "maybe"]}, "target 'yes' is not among the choices"),
        ({"answer_choices": ["yes"]}, "fewer than two choices"),
        ({"answer_choices": ["yes", None]}, "'answer_choices' is not a list of strings"),
    ],
)
@pytest.mark.parametrize("write", [write_table, write_lines])
def test_a_row_that_cannot_be_used_is_refused(tmp_path, write, change, reason):
    write(tmp_path, [WITH_CHOICES, {**WITH_CHOICES, **change}])
    assert refused(tmp_path) == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"inputs_pretokenized": "x"}, "missing field 'targets_pretokenized'"),
        ({**GOOD, "inputs_pretokenized": 5}, "'inputs_pretokenized' is a number, expected"),
        ({**GOOD, "answer_choices": "yes"}, "'answer_choices' is not a list of strings"),
        ([1], "not an object but a list"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused(tmp_path, row, reason):
    assert refused(write_lines(tmp_path, [GOOD, row])).startswith(reason)


def test_a_malformed_line_is_refused_with_its_number(tmp_path):
    write_lines(tmp_path, [GOOD])
    with (tmp_path / "c" / "train.jsonl").open("a") as file:
        file.write("{\n")
    intake = Intake()
    read(tmp_path, "c", intake=intake)
    assert str(intake.rejects[0].place).endswith("c/train.jsonl:2")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([ranked(1, 0), ranked(1, 1)], "0 of 2 choices are correct, expected one"),
        (
            [ranked(1, 0, is_correct=True), ranked(1, 1, is_correct=True)],
            "2 of 2 choices are correct, expected one",
        ),
        ([ranked(1, 0, is_correct=True)], "choices [0]; expected two or more"),
        ([ranked(1, 0, is_correct=True), ranked(1, 2)], "choices [0, 2]; expected two or more"),
        (
            [ranked(1, 0, is_correct=True), ranked(1, 1), ranked(1, 1)],
            "choices [0, 1, 1]; expected two or more from 0 on, each once",
        ),
        (
            [ranked(1, 0, is_correct=True), ranked(1, 1, inputs_pretokenized="other")],
            "its choices have different inputs",
        ),
        ([ranked(1, 0, is_correct=True), ranked(1, 1, targets_pretokenized=" ")], "empty target"),
        ([ranked(1, 0, is_correct=True), ranked(1, 1, is_correct=None)], "'is_correct' is missing"),
        ([{**ranked(1, 0), "idx": [1]}], "'idx' is [1], expected [example, choice]"),
        ([{**ranked(1, 0), "idx": None}], "'idx' is None, expected [example, choice]"),
    ],
)
@pytest.mark.parametrize("write", [write_table, write_lines])
def test_an_example_whose_choices_do_not_fit_is_refused(tmp_path, write, rows, reason):
    write(tmp_path, [*GROUP, *rows], config="c_score_eval")
    assert refused(tmp_path, "c_score_eval").startswith(reason)


def test_rows_of_an_example_need_not_stand_together_or_in_order(tmp_path):
    rows = [ranked(3, 1, is_correct=True), *GROUP, ranked(3, 0)]
    write_table(tmp_path, rows, config="c_score_eval")
    first, second = read(tmp_path, "c_score_eval")
    assert (first.input, first.choices, first.label) == ("ask 3", ("choice 0", "choice 1"), 1)
    assert second.input == "ask 0"


@pytest.mark.parametrize("side", ["input", "target"])
def test_empty_texts_are_kept_on_demand(tmp_path, side):
    write_table(tmp_path, [{**GOOD, f"{side}s_pretokenized": "\n"}])
    (row,) = read(tmp_path, "c", **{f"empty_{side}": "keep"})
    assert "" in (row.input, *row.targets)


def test_a_bad_row_stops_the_reading_on_demand(tmp_path):
    write_table(tmp_path, [GOOD, {**GOOD, "targets_pretokenized": ""}])
    with pytest.raises(DataError, match=r"parquet:2: empty target \(task c\)"):
        read(tmp_path, "c", intake=Intake(on_bad="error"))


@pytest.mark.parametrize("rows", [[], [{**GOOD, "targets_pretokenized": ""}]])
def test_a_config_without_a_usable_row_is_an_error(tmp_path, rows):
    with pytest.raises(DataError, match="no usable row in c, split train"):
        read(write_lines(tmp_path, rows), "c")


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
