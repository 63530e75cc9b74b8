"""The numbers of a report are those of the folders."""

import json
import re
import statistics
from pathlib import Path

import made_runs
import pytest

from mhr_scale.report.build import build
from mhr_scale.report.drawing import by_rows
from mhr_scale.report.page import Page, Picture, Table
from mhr_scale.report.pictures import Curve, Spot, panels, pareto, trade_off
from mhr_scale.report.runs import labels, open_runs
from mhr_scale.report.settings import settings, short_commit
from mhr_scale.report.thinning import thin


def page_of(*folders: Path) -> Page:
    return build(open_runs([str(folder) for folder in folders]))


def tables(page: Page, section: str) -> dict[str, Table]:
    """Tables and the numbers of pictures of a section, by caption."""
    (blocks,) = [s.blocks for s in page.sections if s.id == section]
    found = [block.data if isinstance(block, Picture) else block for block in blocks]
    return {table.caption: table for table in found if isinstance(table, Table)}


def test_the_few_shot_table_has_means_over_tasks_and_spread_over_seeds(tmp_path: Path) -> None:
    page = page_of(made_runs.few_shot(tmp_path))
    table = tables(page, "few-shot")["Few-shot exact_match on 2 tasks, in points"]
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert rows["MHR-z"][:3] == [24576, 768, 51.5]
    assert rows["MHR-z"][3] == pytest.approx(statistics.stdev([50.5, 52.5]))
    assert [row[-1] for row in table.rows] == [2, 2, 2]


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    page = page_of(made_runs.few_shot(tmp_path, seeds=(0,)))
    table = tables(page, "few-shot")["Few-shot exact_match on 2 tasks, in points"]
    assert {row[4] for row in table.rows} == {None}


def test_few_shot_runs_that_are_seeds_are_taken_together(tmp_path: Path) -> None:
    folders = [made_runs.few_shot(tmp_path / str(seed), seeds=(seed,)) for seed in (0, 1)]
    found = tables(page_of(*folders), "few-shot")
    together = found["Few-shot exact_match on 2 tasks, in points"]
    assert [row[-1] for row in together.rows] == [2, 2, 2]
    assert found["0 alone"].is_folded


def test_few_shot_runs_of_other_variants_are_one_table(tmp_path: Path) -> None:
    one, two = (made_runs.few_shot(tmp_path / name, seeds=(0,)) for name in ("one", "two"))
    for result in two.glob("jobs/*/*/*/result.json"):
        values = json.loads(result.read_text())
        result.write_text(json.dumps({**values, "variant": f"other {values['variant']}"}))
    found = tables(page_of(one, two), "few-shot")
    rows = [row[0] for row in found["Few-shot exact_match on 2 tasks, in points"].rows]
    assert sorted(rows) == sorted(
        prefix + name for prefix in ("", "other ") for name in made_runs.VARIANTS
    )
    assert "one alone" not in found


def test_a_variant_of_two_runs_on_one_seed_is_named_by_its_run(tmp_path: Path) -> None:
    folders = [made_runs.few_shot(tmp_path / name, seeds=(0,)) for name in ("one", "two")]
    table = tables(page_of(*folders), "few-shot")["Few-shot exact_match on 2 tasks, in points"]
    names = {f"{name} ({run})" for run in ("one", "two") for name in made_runs.VARIANTS}
    assert {row[0] for row in table.rows} == names


def test_a_variant_in_two_precisions_is_not_averaged_over_them(tmp_path: Path) -> None:
    folders = [made_runs.few_shot(tmp_path / str(seed), seeds=(seed,)) for seed in (0, 1)]
    for folder, dtype in zip(folders, ("float32", "bfloat16"), strict=True):
        starts = [{"backbone": {"dtype": dtype, "quantise": "none"}}]
        (folder / "provenance.json").write_text(json.dumps(starts))
    table = tables(page_of(*folders), "few-shot")["Few-shot exact_match on 2 tasks, in points"]
    assert [row[-1] for row in table.rows] == [1] * 6
    assert "precision differs" in table.note
    assert "LoRA (0) float32" in table.note


def test_selection_on_the_test_rows_is_marked(tmp_path: Path) -> None:
    folder = made_runs.few_shot(tmp_path)
    with (folder / "config.yaml").open("a") as file:
        file.write("selection: {on: test}\n")
    table = tables(page_of(folder), "few-shot")["Few-shot exact_match on 2 tasks, in points"]
    assert [row[0] for row in table.rows] == ["LoRA *", "MHR-z *", "MHR *"]
    assert "selected on the reported test rows" in table.note


def test_evaluations_in_other_precisions_say_so(tmp_path: Path) -> None:
    folders = [made_runs.evaluation(tmp_path / name, None, {"sort": 5.0}) for name in ("a", "b")]
    for folder, dtype in zip(folders, ("float32", "bfloat16"), strict=True):
        starts = [{"backbone": {"dtype": dtype, "quantise": "int8"}}]
        (folder / "provenance.json").write_text(json.dumps(starts))
    table = tables(page_of(*folders), "evaluations")["Evaluations, in points from 0 to 100"]
    assert [row[-1] for row in table.rows] == ["int8 and float32", "int8 and bfloat16"]
    assert "Precision differs" in table.note


def test_few_shot_runs_of_other_tasks_stay_apart(tmp_path: Path) -> None:
    tasks = {"one": ("sort", "copy"), "two": ("sort", "tail")}
    folders = [made_runs.few_shot(tmp_path / n, tasks=t, seeds=(0,)) for n, t in tasks.items()]
    table = tables(page_of(*folders), "few-shot")["Few-shot exact_match on 2 tasks, in points"]
    assert len(table.rows) == len(made_runs.VARIANTS)


def test_few_shot_runs_of_other_settings_stay_apart(tmp_path: Path) -> None:
    one, two = (made_runs.few_shot(tmp_path / str(s), seeds=(s,)) for s in (0, 1))
    with (two / "config.yaml").open("a") as file:
        file.write("protocol: {steps: 7}\n")
    table = tables(page_of(one, two), "few-shot")["Few-shot exact_match on 2 tasks, in points"]
    assert [row[-1] for row in table.rows] == [1, 1, 1]


def test_scores_against_extra_steps_are_grouped_by_method_and_steps(tmp_path: Path) -> None:
    page = page_of(*made_runs.everything(tmp_path))
    table = tables(page, "extra-steps")["Score against extra steps"]
    spread = statistics.stdev([0.0, 0.5])
    assert [list(row) for row in table.rows] == [
        ["MHR-mu", 0, 2, pytest.approx(26.25), pytest.approx(spread)],
        ["MHR-mu", 20, 2, pytest.approx(46.25), pytest.approx(spread)],
    ]


def test_unfinished_evaluations_are_in_no_mean(tmp_path: Path) -> None:
    folders = made_runs.everything(tmp_path)
    (tmp_path / "zero_shot_1_20" / "summary.json").unlink()
    table = tables(page_of(*folders), "extra-steps")["Score against extra steps"]
    assert [row[2] for row in table.rows] == [2, 1]


def test_prompts_have_mean_median_and_spread(tmp_path: Path) -> None:
    folder = made_runs.evaluation(tmp_path / "e", None, {"sort": 20.0}, prompts=("p", "q", "r"))
    table = tables(page_of(folder), "evaluations")["Prompts of e, in points"]
    assert [list(row) for row in table.rows] == [["sort", 3, 22.0, 22.0, 20.0, 24.0, 4.0]]


def test_the_error_of_a_score_is_over_examples_not_over_prompts(tmp_path: Path) -> None:
    folder = made_runs.evaluation(tmp_path / "e", None, {"sort": 20.0}, prompts=("p", "q"))
    table = tables(page_of(folder), "evaluations")["Scores by task"]
    assert table.rows[0][-1] == pytest.approx(statistics.stdev([15.0, 25.0]) / 2**0.5)


def test_a_row_under_several_prompts_is_one_example_in_the_lines_that_evaluate_writes(
    tmp_path: Path,
) -> None:
    """Their examples are named `row/prompt`."""
    folder = made_runs.evaluation(tmp_path / "e", None, {"sort": 20.0}, prompts=("p", "q"))
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    named = [{**line, "example": f"{line['example']}/{line['prompt']}"} for line in lines]
    made_runs.write_lines(folder / "scores.jsonl", named)
    table = tables(page_of(folder), "evaluations")["Scores by task"]
    assert table.rows[0][-1] == pytest.approx(statistics.stdev([15.0, 25.0]) / 2**0.5)


def test_validation_loss_is_sorted_by_the_first_run(tmp_path: Path) -> None:
    page = page_of(made_runs.pretraining(tmp_path))
    table = tables(page, "validation-by-task")["Validation loss by task"]
    assert [list(row) for row in table.rows] == [
        ["reverse", 9.02, 1.52],
        ["copy", 9.01, 1.51],
        ["sort", 9.0, 1.5],
    ]


def test_the_monitors_alignment_is_drawn_where_it_was_written(tmp_path: Path) -> None:
    plain = made_runs.pretraining(tmp_path / "plain", steps=4)
    seen = made_runs.pretraining(tmp_path / "seen", steps=4, extra={"alignment": 0.2})
    assert "Alignment over steps" not in tables(page_of(plain), "learning")
    table = tables(page_of(plain, seen), "learning")["Alignment over steps"]
    assert [list(row) for row in table.rows] == [["seen", n, 0.2] for n in range(1, 5)]


def test_a_matrix_stands_in_the_order_of_its_clusters(tmp_path: Path) -> None:
    page = page_of(made_runs.analysis(tmp_path))
    table = tables(page, "alignment")["Gradient alignment"]
    assert list(table.columns) == ["task", "task_3", "task_2", "task_1", "task_0"]
    assert list(table.rows[0][:3]) == ["task_3", 1.0, pytest.approx(0.284)]


def test_an_analysis_without_alignment_and_routing_is_reported(tmp_path: Path) -> None:
    folder = made_runs.analysis(tmp_path)
    text = (folder / "analysis.json").read_text()
    start, end = text.index('"alignment"'), len(text) - 1
    (folder / "analysis.json").write_text(text[:start] + '"alignment": null}' + text[end + 1 :])
    names = [section.id for section in page_of(folder).sections]
    assert names == ["summary", "routing", "inventory", "parameters"]


def test_skills_without_an_update_have_no_overlap_to_report(tmp_path: Path) -> None:
    """Those of a fresh adapter, and of a run before its first step."""
    folder = made_runs.analysis(tmp_path)
    found = json.loads((folder / "analysis.json").read_text())
    found["inventory"]["overlap"] = [[None, None], [None, None]]
    for linear in found["inventory"]["linears"]:
        linear |= {"norms": [0.0, 0.0], "overlap": None}
    (folder / "analysis.json").write_text(json.dumps(found))
    table = tables(page_of(folder), "inventory")["Overlap of skills"]
    assert [list(row[1:]) for row in table.rows] == [[None, None], [None, None]]


def test_settings_that_differ_come_first(tmp_path: Path) -> None:
    one = made_runs.pretraining(tmp_path / "one", "optim.lr=0.25")
    two = made_runs.pretraining(tmp_path / "two")
    section = settings(open_runs([str(one), str(two)]))
    assert section is not None
    table = section.blocks[0]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["optim.lr", "run.folder"]
    assert table.rows[0][1] == "0.25"


def test_key_figures_of_a_single_run(tmp_path: Path) -> None:
    table = tables(page_of(made_runs.pretraining(tmp_path)), "summary")["Key figures"]
    figures = {row[0]: row[1] for row in table.rows}
    assert figures["trained parameters"] == 10
    assert figures["validation loss, first"] == 9.0
    assert figures["validation loss, last"] == 1.5


def test_a_setting_that_is_not_set_is_a_dash(tmp_path: Path) -> None:
    one = made_runs.pretraining(tmp_path / "one", "run.token_cache=cache")
    two = made_runs.pretraining(tmp_path / "two")
    section = settings(open_runs([str(one), str(two)]))
    assert section is not None
    table = section.blocks[0]
    assert isinstance(table, Table)
    assert {row[0]: list(row[1:]) for row in table.rows}["run.token_cache"] == ["cache", None]


def test_commits_are_short_and_say_what_they_are() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert [
        short_commit(text) for text in (commit, f"{commit}-dirty", f"v1.2-3-g{commit[:7]}")
    ] == [
        "0123456789",
        "0123456789-dirty",
        "v1.2-3-g0123456",
    ]


def test_a_picture_that_would_be_empty_is_its_numbers_alone(tmp_path: Path) -> None:
    folder = made_runs.few_shot(tmp_path / "few")
    for result in folder.glob("jobs/*/*/*/result.json"):
        result.write_text(json.dumps({**json.loads(result.read_text()), "score": 0.0}))
    scored = made_runs.evaluation(tmp_path / "scored", None, {"sort": 0.0})
    lines = (scored / "scores.jsonl").read_text().splitlines()
    zero = [json.dumps({**json.loads(line), "points": 0.0}) + "\n" for line in lines]
    (scored / "scores.jsonl").write_text("".join(zero))
    page = page_of(folder, scored)
    for name in ("few-shot", "evaluations"):
        (blocks,) = [section.blocks for section in page.sections if section.id == name]
        (table,) = [b for b in blocks if isinstance(b, Table) and b.caption == "Scores by task"]
        assert "No value is other than 0." in table.note


def test_three_small_pictures_leave_no_hole() -> None:
    lines = {name: [Curve(name="a", x=[1, 2], y=[1.0, 2.0])] for name in ("one", "two", "three")}
    svg = panels(lines, title="t", x="step")
    backgrounds = re.findall(r'id="axes_\d+">\s*<g id="patch_\d+">\s*<path d="(.*?)"', svg, re.S)
    widths = []
    for path in backgrounds:
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path)]
        widths.append(max(xs) - min(xs))
    assert len(widths) == 3
    assert widths[2] > 1.8 * widths[0]


def test_legends_read_row_by_row() -> None:
    entries, columns = list("abcdefg"), 3
    placed = by_rows(entries, columns)
    sizes = [len(entries) // columns + (c < len(entries) % columns) for c in range(columns)]
    starts = [sum(sizes[:c]) for c in range(columns)]
    read = [placed[starts[c] + row] for row in range(3) for c in range(columns) if row < sizes[c]]
    assert read == entries


def test_routing_groups_are_called_so_and_numbered_where_names_have_no_room(tmp_path: Path) -> None:
    page = page_of(made_runs.analysis(tmp_path, n_groups=70))
    found = tables(page, "routing")
    assert list(found["Usage"].columns) == ["number", "routing group", "skill 0", "skill 1"]
    assert [row[0] for row in found["Usage"].rows] == list(range(70))
    assert found["Routing statistics"].columns[0] == "routing group"
    (blocks,) = [section.blocks for section in page.sections if section.id == "routing"]
    usage = next(block for block in blocks if isinstance(block, Picture))
    assert "routing group (0 to 69, as in the numbers below)" in usage.svg


def test_chance_stands_beside_the_scores_of_ranked_tasks(tmp_path: Path) -> None:
    folder = made_runs.evaluation(tmp_path / "e", None, {"sort": 20.0})
    lines = (folder / "scores.jsonl").read_text().splitlines()
    ranked = [json.dumps({**json.loads(line), "choice_scores": [1, 2, 3, 4]}) for line in lines]
    (folder / "scores.jsonl").write_text("\n".join(ranked) + "\n")
    table = tables(page_of(folder), "evaluations")["Evaluations, in points from 0 to 100"]
    assert (table.columns[-1], table.rows[0][-1]) == ("chance", 25.0)


def test_an_average_is_known_by_its_card_wherever_it_lies(tmp_path: Path) -> None:
    source = made_runs.pretraining(tmp_path / "run")
    folders = []
    for k, place in ((0, "here"), (20, "there/copied")):
        origin = {"averaged_from": str(source), "extra_steps": k, "trainable": "mean"}
        card = tmp_path / place / "adapter.json"
        card.parent.mkdir(parents=True)
        card.write_text(json.dumps({"origin": origin}))
        folders.append(made_runs.evaluation(tmp_path / f"k{k}", card.parent, {"sort": 5.0 + k}))
    table = tables(page_of(*folders), "extra-steps")["Score against extra steps"]
    assert [list(row[:3]) for row in table.rows] == [["MHR-mu", 0, 1], ["MHR-mu", 20, 1]]


def test_averages_of_other_schedules_are_no_seeds_and_no_one_curve(tmp_path: Path) -> None:
    folders = []
    for seed, steps in ((0, (0, 20)), (1, (0, 20, 90))):
        source = made_runs.pretraining(tmp_path / f"run_{seed}", f"run.seed={seed}")
        mean = made_runs.average(tmp_path / f"mean_{seed}", source, steps)
        scored = mean / "averaged" / "000020"
        folders.append(made_runs.evaluation(tmp_path / f"e{seed}", scored, {"sort": 5.0}))
    table = tables(page_of(*folders), "extra-steps")[
        "Zero-shot score against extra steps, in points"
    ]
    assert [row[:3] for row in map(list, table.rows)] == [
        ["MHR-mu, 1 task, schedule of 20 steps", 20, 1],
        ["MHR-mu, 1 task, schedule of 90 steps", 20, 1],
    ]


def test_one_seed_scored_twice_counts_once(tmp_path: Path) -> None:
    source = made_runs.pretraining(tmp_path / "run")
    folders = [made_runs.evaluation(tmp_path / n, source, {"sort": 5.0}) for n in ("a", "b")]
    assert "Seeds together, in points" not in tables(page_of(*folders), "evaluations")


def test_folders_of_an_evaluation_of_averages_are_named_with_the_one_above() -> None:
    assert labels([Path("x/zs/000020"), Path("x/zs/bare"), Path("x/run")]) == [
        "zs/000020",
        "zs/bare",
        "run",
    ]


# -- small parts -----------------------------------------------------------------------------------


def spot(name: str, cost: float, score: float) -> Spot:
    return Spot(name=name, cost=cost, score=score)


def test_the_pareto_front_has_what_none_beats_in_both() -> None:
    spots = [spot("a", 10, 5), spot("b", 5, 5), spot("c", 20, 4), spot("d", 20, 9), spot("e", 1, 1)]
    assert [one.name for one in pareto(spots)] == ["e", "b", "d"]


def test_of_equal_costs_the_better_one_is_on_the_front() -> None:
    assert [one.name for one in pareto([spot("a", 5, 1), spot("b", 5, 2)])] == ["b"]


def test_a_thinned_point_is_the_mean_of_its_neighbours_and_keeps_their_range() -> None:
    found = thin([(step, float(step)) for step in range(1, 8)], most=3)
    assert (found.per_point, found.steps, found.values) == (3, [3, 6, 7], [2.0, 5.0, 7.0])
    assert (found.low, found.high) == ([1.0, 4.0, 7.0], [3.0, 6.0, 7.0])


def test_a_short_curve_keeps_every_point() -> None:
    found = thin([(1, 0.5), (2, 0.25)], most=3)
    assert (found.steps, found.values, found.low) == ([1, 2], [0.5, 0.25], [])


def test_values_that_are_no_numbers_are_set_apart() -> None:
    found = thin([(1, float("inf")), (2, 1.0)])
    assert (found.steps, found.odd) == ([2], [(1, float("inf"))])


def test_many_spots_are_numbered_and_named_below() -> None:
    few, many = (
        trade_off(
            [Spot(name=f"way {n}", cost=n, score=n % 7, error=None) for n in range(1, count + 1)],
            title="t",
            x="x",
            y="y",
        )
        for count in (3, 20)
    )
    assert ("way 3" in few, "1  way 1" in few) == (True, False)
    assert all(f"{n}  way {n}" in many for n in range(1, 21))
