"""The verb `summarise`: seeds of one setting are averaged, all else stands side by side."""

import json
from pathlib import Path

import made_runs
import pytest

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.verbs.summarise import summarise_runs


def seeds(folder: Path, *overrides: tuple[str, ...]) -> list[str]:
    """Evaluations of one run for each seed; `overrides` are those of each source run."""
    made = []
    for seed, words in enumerate(overrides):
        source = made_runs.pretraining(folder / f"run_{seed}", f"run.seed={seed}", *words)
        points = {"sort": 10.0 + 20 * seed}
        made.append(str(made_runs.evaluation(folder / f"scored_{seed}", source, points)))
    return made


def test_runs_that_differ_in_their_seed_only_are_averaged(tmp_path: Path) -> None:
    text = summarise_runs(seeds(tmp_path, (), (), ()))
    assert "3 seeds: " in text
    assert "mean over tasks 30.00 +- 20.00" in text


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("adapter.rank=3", "pretrain.adapter.rank is 2 (scored_0), 3 (scored_1)"),
        (
            "backbone.dtype=bfloat16",
            "backbone.dtype is float32 (scored_0), bfloat16 (scored_1)",
        ),
        ("optim.lr=0.5", "pretrain.optim.lr is 0.01 (scored_0), 0.5 (scored_1)"),
    ],
)
def test_what_differs_in_more_is_set_side_by_side_and_named(
    tmp_path: Path, setting: str, said: str
) -> None:
    text = summarise_runs(seeds(tmp_path, ("backbone.dtype=float32",), (setting,)))
    assert "seeds:" not in text
    assert "not averaged: 2 runs that are not seeds of one setting" in text
    assert said in text
    assert ["sort", "10.00", "30.00"] in [line.split() for line in text.splitlines()]


def test_where_a_run_lies_and_how_fast_it_went_do_not_matter(tmp_path: Path) -> None:
    words = ("run.log_every=7", "batch.micro_batch_size=1", "run.keep=9")
    assert "2 seeds: " in summarise_runs(seeds(tmp_path, (), words))


def test_scoring_in_another_way_is_no_seed(tmp_path: Path) -> None:
    folders = seeds(tmp_path, (), ())
    recipe = Path(folders[1]) / "config.yaml"
    recipe.write_text(recipe.read_text().replace("beams: 1", "beams: 4"))
    assert "scoring.beams is 1 (scored_0), 4 (scored_1)" in summarise_runs(folders)


def test_the_precision_that_scored_counts_not_the_one_of_the_training(tmp_path: Path) -> None:
    folders = seeds(tmp_path, (), ())
    for folder, dtype in zip(folders, ("float32", "bfloat16"), strict=True):
        starts = [{"backbone": {"dtype": dtype, "quantise": "none"}}]
        (Path(folder) / "provenance.json").write_text(json.dumps(starts))
    assert "precision is float32 (scored_0), bfloat16 (scored_1)" in summarise_runs(folders)


@pytest.mark.parametrize(
    ("content", "said"),
    [(("ab", "ab"), "2 seeds: "), (("ab", "cd"), "rows of sort is ab (scored_0), cd (scored_1)")],
)
def test_rows_are_told_by_their_content_not_by_their_folder(
    tmp_path: Path, content: tuple[str, str], said: str
) -> None:
    folders = seeds(tmp_path, (), ())
    for folder, rows in zip(folders, content, strict=True):
        recipe = Path(folder) / "config.yaml"
        mine = f"tasks: {{suite: jsonl, folder: {folder}}}"
        recipe.write_text(recipe.read_text().replace("tasks: {suite: toy}", mine))
        (Path(folder) / "inputs.json").write_text(json.dumps({"rows of sort": rows}))
    assert said in summarise_runs(folders)


def test_other_numbers_of_extra_steps_are_no_seeds(tmp_path: Path) -> None:
    source = made_runs.pretraining(tmp_path / "run")
    mean = made_runs.average(tmp_path / "mean", source, steps=(0, 20))
    folders = [
        str(made_runs.evaluation(tmp_path / f"k{k}", mean / "averaged" / f"{k:06d}", {"sort": 5.0}))
        for k in (0, 20)
    ]
    assert "average.steps is 0 (k0), 20 (k20)" in summarise_runs(folders)


def test_one_seed_twice_is_not_two(tmp_path: Path) -> None:
    source = made_runs.pretraining(tmp_path / "run", "run.seed=5")
    folders = [
        str(made_runs.evaluation(tmp_path / name, source, {"sort": 5.0})) for name in ("a", "b")
    ]
    text = summarise_runs(folders)
    assert "b: the same seed as a (" in text
    assert "pretrain.run.seed 5" in text
    with pytest.raises(ConfigError, match="named twice"):
        summarise_runs([folders[0], f"{folders[0]}/../a"])


def test_other_tasks_and_unfinished_runs_are_named(tmp_path: Path) -> None:
    one, two = seeds(tmp_path, (), ())
    (Path(one) / "summary.json").unlink()
    scores = Path(two) / "scores.jsonl"
    scores.write_text(scores.read_text().splitlines()[0] + "\n")
    text = summarise_runs([one, two])
    assert "scored_0: unfinished, 2 examples" in text
    assert "scored_1: other tasks or examples than scored_0" in text


def test_scores_without_a_recipe_are_averaged_with_nothing(tmp_path: Path) -> None:
    one, two = seeds(tmp_path, (), ())
    (Path(two) / "config.yaml").unlink()
    assert "scored_1: no config.yaml says what it scored" in summarise_runs([one, two])


def test_help_says_how() -> None:
    assert summarise_runs(["--help"]).startswith("mhr_scale summarise RUN [RUN ...]")


def test_a_folder_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no scores here"):
        summarise_runs([str(tmp_path)])
    (tmp_path / "scores.jsonl").write_text(json.dumps({"id": "torn"})[:5])
    with pytest.raises(RunError, match="no scores here"):
        summarise_runs([str(tmp_path)])
