"""Tables from scores: means, prompts, seeds."""

import json
from pathlib import Path

import pytest

from mhr_scale.errors import RunError
from mhr_scale.scores import summary
from mhr_scale.verbs.summarise import summarise_runs


def score(task: str, example: str, points: float, prompt: str = "") -> dict:
    name = f"{example}/{prompt}" if prompt else example
    return {
        "id": f"{task}/{name}",
        "task": task,
        "example": name,
        "prompt": prompt,
        "metric": "accuracy",
        "points": points,
    }


SCORES = [
    score("a", "1", 100.0, "p"),
    score("a", "2", 0.0, "p"),
    score("a", "1", 100.0, "q"),
    score("a", "2", 100.0, "q"),
    score("b", "1", 0.0),
]


def test_a_task_is_the_mean_of_its_examples() -> None:
    assert summary.summarise(SCORES)["tasks"]["a"]["mean"] == 75.0


def test_prompts_have_their_mean_median_and_spread() -> None:
    task = summary.summarise(SCORES)["tasks"]["a"]
    assert task["prompts"] == {"p": 50.0, "q": 100.0}
    assert (task["prompt_mean"], task["prompt_median"], task["prompt_spread"]) == (75.0, 75.0, 50.0)


def test_a_task_of_one_prompt_has_no_prompt_table() -> None:
    assert "prompts" not in summary.summarise(SCORES)["tasks"]["b"]


def test_tasks_count_alike_and_examples_count_alike() -> None:
    found = summary.summarise(SCORES)
    assert (found["mean_over_tasks"], found["mean_over_examples"]) == (37.5, 60.0)


def test_order_and_duplicates_do_not_matter() -> None:
    assert summary.summarise([*reversed(SCORES), SCORES[0]]) == summary.summarise(SCORES)


def test_seeds_are_aggregated_in_both_ways() -> None:
    seeds = [
        summary.summarise([score("a", "1", a), score("b", "1", b)])
        for a, b in ((10.0, 40.0), (20.0, 0.0), (90.0, 20.0))
    ]
    found = summary.aggregate(seeds)
    assert found["median_per_task"] == {"a": 20.0, "b": 20.0}
    assert found["median_then_mean"] == 20.0
    assert found["mean_then_std"] == pytest.approx([30.0, 22.9128785])


def test_seeds_with_other_tasks_are_refused() -> None:
    one, two = (summary.summarise([score(task, "1", 1.0)]) for task in "ab")
    with pytest.raises(RunError, match="seeds differ in their tasks: a, b"):
        summary.aggregate([one, two])


def test_a_line_torn_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(SCORES[0]) + "\n" + json.dumps(SCORES[1])[:30])
    assert summary.read_scores(path) == SCORES[:1]


def test_a_broken_line_before_the_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text("{\n" + json.dumps(SCORES[0]) + "\n")
    with pytest.raises(RunError, match=r"scores\.jsonl:1: not a score"):
        summary.read_scores(path)


def test_the_table_has_a_line_per_task_and_the_means() -> None:
    lines = summary.table(summary.summarise(SCORES)).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "a", "b", "mean", "mean"]


def write(folder: Path, points: float) -> str:
    folder.mkdir()
    (folder / "scores.jsonl").write_text(json.dumps(score("a", "1", points)) + "\n")
    return str(folder)


def test_several_runs_are_taken_as_seeds(tmp_path: Path) -> None:
    text = summarise_runs([write(tmp_path / "one", 10.0), write(tmp_path / "two", 30.0)])
    assert "2 seeds: " in text
    assert "mean over tasks 20.00 +- 14.14" in text


def test_help_says_how() -> None:
    assert summarise_runs(["--help"]).startswith("python launch/summarise.py RUN [RUN ...]")


def test_a_folder_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no scores here"):
        summarise_runs([str(tmp_path)])
