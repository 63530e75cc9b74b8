"""CrossFit from pre-training to the table by partition, on hand-made folders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from crossfit_files import LISTS, write_crossfit
from small_runs import BARE, LORA, SHORT, TOY, make_config, results

from mhr_scale.config import (
    EvaluateConfig,
    PlainRunConfig,
    PretrainConfig,
    ScoringConfig,
    SelectionConfig,
    ShotsConfig,
    VariantConfig,
)
from mhr_scale.recipe.reading import load
from mhr_scale.report.build import build
from mhr_scale.report.page import Table
from mhr_scale.report.runs import open_runs
from mhr_scale.scores import summary
from mhr_scale.tasks.crossfit import metrics
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("on_cpu")
SCORING = ScoringConfig(max_new_tokens=4, max_input_tokens=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("crossfit")


@pytest.fixture(scope="module")
def suite(base):
    return write_crossfit(base)


@pytest.fixture(scope="module")
def source(base, suite) -> Path:
    short = [word for word in SHORT if not word.startswith("tasks.")]
    tasks = f"suite: crossfit, folder: {suite.folder}, partition: {suite.partition}"
    words = [*short, f"tasks={{{tasks}, seeds: [13, 21]}}", f"run.folder={base / 'source'}"]
    pretrain(load(PretrainConfig, TOY, [*words, "schedule.steps=2"]))
    return base / "source"


@pytest.fixture(scope="module")
def run(base, suite, source) -> Path:
    config = make_config(
        base / "few_shot",
        base,
        {"direct": LORA, "MHR": VariantConfig(adapter=str(source))},
        tasks=replace(suite, fold="test", chat=False),
        gain_over="direct",
        shots=ShotsConfig(seeds=(13, 21)),
        scoring=SCORING,
        selection=SelectionConfig(on=None, every_epochs=1, at_start=False),
    )
    adapt(replace(config, protocol=replace(config.protocol, steps=2, loss="language_model")))
    return base / "few_shot"


def test_pre_training_has_a_routing_row_for_each_training_task(source):
    card = json.loads((source / "adapter" / "adapter.json").read_text())
    assert card["task_names"] == sorted(LISTS["train"])


def test_jobs_are_selected_on_dev_rows_and_scored_by_the_tasks_metrics(run):
    found = results(run)
    assert len(found) == 2 * 2 * 2
    assert {(task, one["metric"]) for (task, _, _), one in found.items()} == {
        ("freebase_qa", "squad_em"),
        ("glue-cola", "matthews"),
    }
    assert {one["selected_on"] for one in found.values()} == {"validation"}
    for (task, seed, variant), one in found.items():
        lines = summary.read_scores(run / "jobs" / task / seed / variant / "scores.jsonl")
        assert [line["example"] for line in lines] == ["test:1", "test:2", "test:3"]
        said, right = [[line[name] for line in lines] for name in ("prediction", "references")]
        if task == "glue-cola":
            assert one["score"] == pytest.approx(metrics.matthews(said, right))
        else:
            assert right[1] == [" answer 1", " the 1"]
            ems = [metrics.squad_em(*pair) for pair in zip(said, right, strict=True)]
            assert one["score"] == pytest.approx(sum(ems) / 3)


def test_the_report_has_a_row_for_the_partition(run):
    result = run / "jobs" / "freebase_qa"
    for variant, score in (("direct", 40.0), ("MHR", 50.0)):
        for seed in ("13", "21"):
            file = result / seed / variant / "result.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "score": score}))
    (few_shot,) = [s for s in build(open_runs([str(run)])).sections if s.id == "few-shot"]
    (table,) = [b for b in few_shot.blocks if isinstance(b, Table) and b.caption == "By partition"]
    assert list(table.columns) == ["partition", "tasks", "direct", "MHR", "MHR: gain"]
    (row,) = table.rows
    assert list(row[:2]) == ["partition", 2]
    assert row[4] == pytest.approx(25.0)
    assert "without glue-cola" in table.note


def test_a_correlation_is_of_all_rows_of_an_evaluation(base, suite):
    config = EvaluateConfig(
        backbone=BARE,
        tasks=replace(suite, fold="dev"),
        scoring=SCORING,
        run=PlainRunConfig(folder=str(base / "scores")),
    )
    evaluate(config)
    file = base / "scores" / "scores.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["references"] for line in lines] == [[" 0"], [" 1"], [" 2"]]
    made = [{**line, "prediction": str(-n), "points": 0.0} for n, line in enumerate(lines)]
    file.write_text("".join(json.dumps(line) + "\n" for line in made))
    (scored,) = open_runs([str(base / "scores")])
    assert scored.summary["tasks"]["app_reviews"]["mean"] == pytest.approx(-100.0)
    assert scored.errors == {}
