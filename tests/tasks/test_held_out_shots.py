"""T-Few's few-shot files: read whole, drawn again, refused where they differ."""

import json
from collections import Counter

import numpy as np
import pytest
from held_out_files import (
    RTE,
    RTE_TEMPLATES,
    template,
    write_rows,
    write_templates,
)

from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.t0.held_out_prompts import Prompts
from mhr_scale.tasks.t0.held_out_rows import TASKS, find_rows
from mhr_scale.tasks.t0.held_out_shots import (
    check_shots,
    draw_rows,
    first_shuffled,
    has_shots,
    list_seeds,
    read_shots,
    train_examples,
)

TRAIN_ROWS = {
    "rte": 2490,
    "cb": 250,
    "anli-r1": 16946,
    "anli-r2": 45460,
    "anli-r3": 100459,
    "winogrande": 40398,
    "hellaswag": 39905,
    "wic": 5428,
}
SEEDS = [0, 1, 32, 42, 1024]


@pytest.fixture
def files(shared):
    return shared / "data" / "tfew_few_shot"


def prompts_of(shared, task):
    return open_prompts(shared / "data" / "promptsource_templates" / "templates", task)


def open_prompts(folder, task):
    return Prompts(TASKS[task], folder=folder, max_characters=2048, seed=42)


def rte_rows(count):
    return [{**RTE, "idx": idx, "premise": f"p{idx}"} for idx in range(count)]


def write_shots(folder, *rows, count=None, seed=0, task="rte"):
    name = f"{len(rows) if count is None else count}_shot"
    write_rows(folder / task / name / f"{seed}_seed.jsonl", *rows)


def rte_prompts(folder, *templates):
    write_templates(folder, "super_glue", "rte", *(templates or RTE_TEMPLATES))
    return open_prompts(folder / "templates", "rte")


def draw_rte(folder, **options):
    return draw_rows(find_rows(TASKS["rte"], "train", folder=folder), "rte", **options)


# Real files


@pytest.mark.parametrize("task", TRAIN_ROWS)
def test_files_of_all_seeds_are_read_and_are_t_few_s_draw(files, task):
    seeds = list_seeds(files, task)
    assert seeds == ([0, 1, 32, 42, 100, 1024] if task in ("rte", "wic") else SEEDS)
    for seed in seeds:
        rows = read_shots(files, task, seed=seed)
        assert len(rows) == TASKS[task].shots
        drawn = first_shuffled(range(TRAIN_ROWS[task]), seed=seed, count=len(rows))
        assert [row.idx for row in rows] == drawn


@pytest.mark.parametrize("task", ["anli-r1", "anli-r2", "anli-r3"])
def test_thirty_two_shots_of_anli_open_the_file_of_fifty(files, task):
    for seed in SEEDS:
        rows = read_shots(files, task, seed=seed, shots=TASKS[task].mhr_shots)
        path = files / task / "50_shot" / f"{seed}_seed.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()[:32]]
        assert [row.fields for row in rows] == lines
        assert [row.place.line for row in rows] == list(range(1, 33))


@pytest.mark.parametrize("task", TRAIN_ROWS)
def test_every_real_row_trains_under_every_template(shared, files, task):
    prompts = prompts_of(shared, task)
    for seed in list_seeds(files, task):
        rows = read_shots(files, task, seed=seed)
        assert all(prompts.applicable(row) == prompts.templates for row in rows)
        check_shots(prompts, rows)


@pytest.mark.parametrize("task", TRAIN_ROWS)
def test_epochs_draw_templates_evenly_and_keep_the_rows(shared, files, task):
    prompts = prompts_of(shared, task)
    rows = read_shots(files, task, seed=42)
    counts = Counter()
    for epoch in range(20):
        examples = train_examples(prompts, rows, seed=42, epoch=epoch)
        for row, example in zip(rows, examples, strict=True):
            number, _, name = example.id.partition("/")
            counts[name] += 1
            assert (int(number), example.label) == (row.idx, row.label)
            assert example.targets == (example.choices[example.label],)
    expected = 20 * len(rows) / len(prompts.templates)
    assert counts.keys() == {one.name for one in prompts.templates}
    assert all(0.5 * expected < count < 1.6 * expected for count in counts.values())


def test_a_template_that_chooses_its_wording_does_so_anew_every_epoch(shared, files):
    prompts = prompts_of(shared, "hellaswag")
    (row, *_) = read_shots(files, "hellaswag", seed=0)
    openings = set()
    for epoch in range(60):
        (example,) = train_examples(prompts, [row], seed=0, epoch=epoch)
        if example.id.endswith("/Randomized prompts template"):
            openings.add(example.input.partition("\n")[0])
    assert len(openings) == 4


def test_tasks_without_files_have_none(files):
    assert has_shots(files, "hellaswag")
    assert not has_shots(files, "copa")
    assert list_seeds(files, "copa") == []


# Files


def test_the_smallest_file_with_enough_rows_is_read(tmp_path):
    write_shots(tmp_path, *rte_rows(10))
    write_shots(tmp_path, *rte_rows(9)[::-1])
    write_shots(tmp_path, *rte_rows(2))
    assert [row.idx for row in read_shots(tmp_path, "rte", seed=0, shots=3)] == [8, 7, 6]


def test_a_missing_seed_lists_the_seeds_there_are(tmp_path):
    for seed in (42, 7):
        write_shots(tmp_path, *rte_rows(32), seed=seed)
    with pytest.raises(DataError, match=r"0_seed\.jsonl: no seed 0 of rte; seeds there: 7, 42"):
        read_shots(tmp_path, "rte", seed=0)


def test_a_wrong_number_of_rows_is_an_error(tmp_path):
    write_shots(tmp_path, *rte_rows(31), count=32)
    with pytest.raises(DataError, match="31 rows, expected the 32 that its folder tells"):
        read_shots(tmp_path, "rte", seed=0)


def test_more_shots_than_there_are_is_an_error(tmp_path):
    write_shots(tmp_path, *rte_rows(2))
    write_shots(tmp_path, *rte_rows(4))
    with pytest.raises(DataError, match="no 5 shots of rte; the files there have 2, 4"):
        read_shots(tmp_path, "rte", seed=0, shots=5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({**RTE, "label": -1}), r"hidden label \(task rte\); mend the row"),
        ("{oops", "malformed JSON"),
    ],
)
def test_a_bad_row_is_an_error(tmp_path, line, message):
    write_shots(tmp_path, *rte_rows(1), count=2)
    with (tmp_path / "rte" / "2_shot" / "0_seed.jsonl").open("a") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(DataError, match=rf"0_seed\.jsonl:2: {message}"):
        read_shots(tmp_path, "rte", seed=0, shots=2)


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder of few-shot files"):
        read_shots(tmp_path / "none", "rte", seed=0)
    with pytest.raises(DataError, match="no few-shot files of rte; expected rte/<K>_shot"):
        read_shots(tmp_path, "rte", seed=0)
    with pytest.raises(ConfigError, match="shots: 0 is not at least 1"):
        read_shots(tmp_path, "rte", seed=0, shots=0)


# Draws


def test_a_draw_is_the_head_of_numpy_s_shuffle():
    rows = [f"row {number}" for number in range(50)]
    shuffled = list(rows)
    np.random.RandomState(3).shuffle(shuffled)
    assert first_shuffled(rows, seed=3, count=7) == shuffled[:7]
    assert first_shuffled(rows, seed=3, count=50) == shuffled


def test_a_bad_row_of_the_train_split_counts_only_if_it_is_drawn(tmp_path):
    order = first_shuffled(range(20), seed=5, count=20)
    rows = rte_rows(20)
    rows[order[4]]["label"] = -1
    write_rows(tmp_path / "rte.train.jsonl", *rows)
    drawn = draw_rte(tmp_path, seed=5, shots=4)
    assert [row.idx for row in drawn] == order[:4]
    with pytest.raises(DataError, match="hidden label"):
        draw_rte(tmp_path, seed=5, shots=5)


def test_a_broken_line_of_the_train_split_is_an_error(tmp_path):
    write_rows(tmp_path / "rte.train.jsonl", *rte_rows(20))
    with (tmp_path / "rte.train.jsonl").open("a") as lines:
        lines.write("oops\n")
    with pytest.raises(DataError, match=r"train\.jsonl:21: malformed JSON"):
        draw_rte(tmp_path, seed=5, shots=1)


# Epochs


def test_an_epoch_is_a_function_of_its_numbers_alone(tmp_path):
    write_shots(tmp_path, *rte_rows(32))
    rows = read_shots(tmp_path, "rte", seed=0)
    prompts = rte_prompts(tmp_path)
    epochs = [train_examples(prompts, rows, seed=0, epoch=epoch) for epoch in (0, 1, 2)]
    again = train_examples(rte_prompts(tmp_path), rows[::-1], seed=0, epoch=1)
    assert again[::-1] == epochs[1]
    assert len(set(epochs)) == 3
    assert train_examples(prompts, rows, seed=1, epoch=1) != epochs[1]


def test_a_template_that_fails_on_a_row_is_an_error_when_it_is_drawn(tmp_path):
    write_shots(tmp_path, *rte_rows(2))
    rows = read_shots(tmp_path, "rte", seed=0, shots=2)
    bad = template("d", "{{premise}} ||| {{'maybe' if idx else answer_choices[label]}}")
    prompts = rte_prompts(tmp_path, *RTE_TEMPLATES, bad)
    drawn = [prompts.draw(rows[1], seed=0, epoch=epoch).name for epoch in range(100)]
    message = r"0_seed\.jsonl:2: template 'd': target 'maybe' is not a choice; mend the row"
    with pytest.raises(DataError, match=message):
        train_examples(prompts, rows, seed=0, epoch=drawn.index("d"))


def test_a_shot_without_the_fields_of_any_template_is_an_error(tmp_path):
    write_shots(tmp_path, *rte_rows(2))
    rows = read_shots(tmp_path, "rte", seed=0, shots=2)
    prompts = rte_prompts(tmp_path, template("d", "{{genre}} ||| {{answer_choices[label]}}"))
    with pytest.raises(DataError, match=r"no template applies \('d' needs genre\); mend the row"):
        check_shots(prompts, rows)
