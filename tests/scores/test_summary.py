"""Tables from scores: means, prompts, seeds."""

import json
from pathlib import Path

import pytest

from mhr_scale.errors import RunError
from mhr_scale.scores import summary


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
    assert (found["mean_over_tasks"], found["mean_over_examples"]) == (37.5, 50.0)


def test_a_row_under_several_prompts_is_one_example() -> None:
    found = summary.summarise(SCORES)
    assert (found["tasks"]["a"]["examples"], found["examples"]) == (2, 3)


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


def test_choice_scores_that_are_no_list_are_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    lines = [{**SCORES[0], "choice_scores": 5}, SCORES[1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=r"scores\.jsonl:1: not a score \(choice_scores are 5"):
        summary.read_scores(path)


def test_the_table_has_a_line_per_task_and_the_means() -> None:
    lines = summary.table(summary.summarise(SCORES)).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "a", "b", "mean", "mean"]


def test_chance_is_one_of_the_choices_of_every_question() -> None:
    ranked = [{**score("a", str(n), 0.0), "choice_scores": [1.0] * n} for n in (2, 4)]
    found = summary.summarise([*ranked, score("b", "1", 0.0)])
    assert found["tasks"]["a"]["chance"] == 37.5
    assert "chance" not in found["tasks"]["b"]
    assert "37.50" in summary.table(found)


def test_summaries_stand_side_by_side_with_chance_beside_them() -> None:
    ranked = {**score("a", "1", 60.0), "choice_scores": [1.0, 2.0]}
    two = [ranked, score("b", "1", 0.0)]
    found = {"one": summary.summarise([ranked]), "two": summary.summarise(two)}
    lines = summary.side_by_side(found).splitlines()
    assert [line.split() for line in lines] == [
        ["task", "one", "two", "chance"],
        ["a", "60.00", "60.00", "50.00"],
        ["b", "-", "0.00", "-"],
        ["mean", "over", "tasks", "60.00", "30.00", "-"],
    ]
