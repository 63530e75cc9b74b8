"""From results of jobs to the table of a paper."""

import random
import statistics

import pytest

from mhr_scale.scores.comparison import compare, table

#: Scores by variant, seed and task.
SCORES = {
    "MHR": {0: (60.0, 40.0), 1: (70.0, 40.0), 2: (65.0, 10.0)},
    "LoRA": {0: (50.0, 30.0), 1: (50.0, 30.0), 2: (50.0, 30.0)},
}
TASKS = ("rte", "wic")


def result(variant: str, seed: int, task: str, score: float, **changes: object) -> dict:
    return {
        "task": task,
        "seed": seed,
        "variant": variant,
        "score": score,
        "metric": "accuracy",
        "kind": "full",
        "adapter": f"runs/{variant}",
        "source_numbers": 17_694_720,
        "trained_numbers": 221_184,
        **changes,
    }


def results(scores=SCORES, tasks=TASKS) -> list[dict]:
    return [
        result(variant, seed, task, score)
        for variant, seeds in scores.items()
        for seed, found in seeds.items()
        for task, score in zip(tasks, found, strict=True)
    ]


@pytest.fixture
def mhr() -> dict:
    return compare(results())["variants"]["MHR"]


def test_the_mean_is_over_tasks_then_over_seeds(mhr):
    assert mhr["mean"] == pytest.approx((50.0 + 55.0 + 37.5) / 3)


def test_the_spread_is_over_the_seeds_means(mhr):
    assert mhr["std_over_seeds"] == pytest.approx(statistics.stdev([50.0, 55.0, 37.5]))


def test_medians_are_per_task_over_seeds(mhr):
    assert mhr["median_per_task"] == {"rte": 65.0, "wic": 40.0}
    assert mhr["mean_of_medians"] == 52.5


def test_one_seed_has_no_spread():
    found = compare(results({"MHR": {7: (60.0, 40.0)}}))["variants"]["MHR"]
    assert (found["mean"], found["std_over_seeds"], found["seeds"]) == (50.0, 0.0, [7])


def test_the_order_of_the_results_does_not_matter():
    shuffled = random.Random(0).sample(results(), 12)
    found, again = compare(results()), compare(shuffled)
    assert found == again
    assert list(compare(results())["variants"]) == ["MHR", "LoRA"]


def test_what_a_variant_is_stands_beside_its_scores(mhr):
    assert (mhr["kind"], mhr["adapter"], mhr["metrics"]) == ("full", "runs/MHR", ["accuracy"])
    assert (mhr["multi_task_numbers"], mhr["adaptation_numbers"]) == (17_694_720, 221_184)


# --- what is not finished


def test_a_seed_that_lacks_a_task_is_left_out_and_named():
    unfinished = [
        one for one in results() if (one["variant"], one["seed"], one["task"]) != ("MHR", 1, "wic")
    ]
    found = compare(unfinished)
    mhr = found["variants"]["MHR"]
    assert (mhr["seeds"], mhr["incomplete_seeds"]) == ([0, 2], [1])
    assert mhr["mean"] == pytest.approx((50.0 + 37.5) / 2)
    assert mhr["median_per_task"] == {"rte": 62.5, "wic": 25.0}
    assert found["variants"]["LoRA"]["seeds"] == [0, 1, 2]


def test_a_variant_without_a_whole_seed_has_no_numbers():
    found = compare([*results({"LoRA": SCORES["LoRA"]}), result("MHR", 0, "rte", 99.0)])
    mhr = found["variants"]["MHR"]
    assert (mhr["seeds"], mhr["incomplete_seeds"]) == ([], [0])
    assert not {"mean", "std_over_seeds", "mean_of_medians", "median_per_task"} & mhr.keys()
    assert found["variants"]["LoRA"]["mean"] == 40.0


def test_a_task_that_no_job_has_finished_leaves_no_seed_whole():
    """Nor is the mean silently one over fewer tasks."""
    found = compare(results(), tasks=["rte", "wic", "copa"])
    assert found["tasks"] == ["copa", "rte", "wic"]
    for variant in found["variants"].values():
        assert (variant["seeds"], variant["incomplete_seeds"]) == ([], [0, 1, 2])


# --- as text


def lines(found: dict) -> list[list[str]]:
    return [line.split() for line in table(found).splitlines()]


def test_the_table_has_a_line_per_variant():
    head, mhr, lora = lines(compare(results()))[:3]
    assert " ".join(head) == "variant multi-task adaptation mean +- seeds medians seeds"
    assert mhr == ["MHR", "17.7M", "221.2K", "47.50", "9.01", "52.50", "3"]
    assert lora == ["LoRA", "17.7M", "221.2K", "40.00", "0.00", "40.00", "3"]


def test_the_second_table_has_the_medians_of_every_task():
    *_, head, rte, wic = lines(compare(results()))
    assert head == ["task", "(median", "over", "seeds)", "MHR", "LoRA"]
    assert (rte, wic) == (["rte", "65.00", "50.00"], ["wic", "40.00", "30.00"])


def test_long_names_do_not_shift_columns():
    scores = {"a rather long name": SCORES["MHR"], "b": SCORES["LoRA"]}
    first, second = table(compare(results(scores))).rstrip().split("\n\n")
    head, *rows = first.splitlines()
    assert {row.index("17.7M") + len("17.7M") for row in rows} == {
        head.index("-task") + len("-task")
    }
    assert len({len(line) for line in second.splitlines()}) == 1


def test_unfinished_seeds_are_told():
    scores = {**SCORES, "late": {0: (1.0, 2.0)}}
    unfinished = [*results(scores), result("late", 5, "wic", 3.0), result("none", 4, "rte", 9.0)]
    by_name = {words[0]: words for words in lines(compare(unfinished)) if words}
    assert by_name["late"][-3:] == ["1", "(unfinished:", "5)"]
    assert by_name["none"][3:] == ["-", "-", "-", "0", "(unfinished:", "4)"]


def test_a_table_of_nothing_finished_has_no_second_part():
    text = table(compare([result("a", 0, "rte", 1.0), result("b", 0, "wic", 1.0)]))
    assert "median over seeds" not in text
    assert text.count("\n") == 3


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (512, "512"), (3_456, "3.5K"), (2_211_840, "2.2M"), (2_850_000_000, "2.9B")],
)
def test_numbers_of_parameters_are_short(count, text):
    found = compare([result("a", 0, "rte", 1.0, source_numbers=count)])
    assert lines(found)[1][1] == text


def test_variants_that_the_test_rows_selected_are_marked(mhr):
    assert "selected" not in table(compare(results()))
    selected = [{**result, "selected_on": "test"} for result in results()]
    lines = table(compare(selected)).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["MHR", "*"], ["LoRA", "*"]]
    assert lines[3].startswith("* the best checkpoint was selected on the reported test rows")


def test_mixed_precision_is_told_below_the_table():
    mixed = [
        {**result, "precision": "bfloat16" if result["variant"] == "LoRA" else "float32"}
        for result in results()
    ]
    text = table(compare(mixed))
    assert "precision differs, and scores with it: MHR float32, LoRA bfloat16" in text
    stored = [
        {**result, "stored_precision": "bfloat16" if result["variant"] == "LoRA" else "float32"}
        for result in results()
    ]
    assert "MHR unknown, LoRA adapter stored in bfloat16" in table(compare(stored))
    same = table(compare([{**result, "precision": "float32"} for result in results()]))
    assert "precision" not in same


# --- average relative gain


def test_the_gain_is_relative_by_task_over_the_seeds_of_both():
    scores = {**SCORES, "LoRA": {0: (50.0, 30.0), 1: (40.0, 20.0)}}
    found = compare(results(scores), gain_over="LoRA")["variants"]
    by_task = ((65.0 - 45.0) / 45.0, (40.0 - 25.0) / 25.0)
    assert found["MHR"]["relative_gain"] == pytest.approx(100 * sum(by_task) / 2)
    assert found["MHR"]["without_gain"] == []
    assert "relative_gain" not in found["LoRA"]


def test_a_task_that_scores_nothing_without_it_has_no_gain():
    scores = {"MHR": {0: (60.0, 40.0)}, "direct": {0: (50.0, -3.0)}, "zero": {0: (0.0, 0.0)}}
    found = compare(results(scores), gain_over="direct")
    mhr = found["variants"]["MHR"]
    assert (mhr["relative_gain"], mhr["without_gain"]) == (pytest.approx(20.0), ["wic"])
    text = table(found)
    assert "over direct, in per cent, without wic (not above 0 there)" in text
    head, first, second, _ = lines(found)[:4]
    assert (head[-1], first[-1], second[-1]) == ("gain", "+20.00", "-")
    nothing = compare(results(scores), gain_over="zero")
    assert nothing["variants"]["MHR"]["relative_gain"] is None
    assert "gain" not in table(nothing)
