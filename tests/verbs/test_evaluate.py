"""The verb `evaluate`: one score per example, tables made from them, jobs that go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from processes import ROOT
from small_runs import BARE, make_source

from mhr_scale.config import (
    AverageConfig,
    EvaluateConfig,
    JsonlTasks,
    PlainRunConfig,
    RunConfig,
    ScoringConfig,
    ToyTasks,
)
from mhr_scale.engine.opened import open_backbone
from mhr_scale.errors import AdapterError, ConfigError, DataError, RunError
from mhr_scale.scores import questions, summary
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.verbs.average import average
from mhr_scale.verbs.evaluate import evaluate, open_adapter_of, read_questions

TASKS = ToyTasks(suite="toy", n_tasks=4, train_examples=10, validation_examples=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    return make_source(folder, "tasks.validation_examples=5")


def settings(folder: Path, source: Path | None = None, **changes: object) -> EvaluateConfig:
    config = EvaluateConfig(
        adapter=None if source is None else str(source),
        backbone=BARE if source is None else None,
        tasks=TASKS,
        scoring=ScoringConfig(metric="accuracy", max_tokens=300),
        run=PlainRunConfig(folder=str(folder)),
    )
    return replace(config, **changes)


def scores(folder: Path) -> list[dict]:
    return summary.read_scores(folder / "scores.jsonl")


def by_id(folder: Path) -> dict[str, dict]:
    return {score["id"]: score for score in scores(folder)}


@pytest.fixture(scope="module")
def ranked(source: Path) -> Path:
    return evaluate(settings(source.parent / "ranked", source))


def test_every_example_has_one_score(ranked: Path) -> None:
    ids = [json.loads(line)["id"] for line in (ranked / "scores.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 4 * 5


def test_a_score_tells_every_choice_and_the_best_one(ranked: Path) -> None:
    for score in scores(ranked):
        best = min(range(5), key=score["choice_scores"].__getitem__)
        assert score["prediction"] == best
        assert score["points"] == 100.0 * (best == score["label"])


def test_scores_stand_in_the_order_of_their_tasks_and_rows(ranked: Path) -> None:
    tasks, _ = read_evaluation(TASKS, examples=None)
    wanted = [f"{task.name}/{example.id}" for task in tasks for example in task.test]
    assert [score["id"] for score in scores(ranked)] == wanted


def test_scores_hold_the_texts_that_were_asked_unless_there_are_many(
    ranked: Path, source: Path, tmp_path: Path
) -> None:
    (first, *_), _ = read_evaluation(TASKS, examples=None)
    example, line = first.test[0], scores(ranked)[0]
    assert (line["input"], line["choices"]) == (example.input, list(example.choices))
    assert line["choices"][line["label"]] == example.targets[0]
    without = ScoringConfig(metric="accuracy", max_tokens=300, texts=False)
    bare = scores(evaluate(settings(tmp_path / "bare", source, scoring=without)))
    texts = {"input", "choices"}
    assert bare == [
        {key: value for key, value in score.items() if key not in texts} for score in scores(ranked)
    ]
    assert [questions.keeps_texts(ScoringConfig(), n) for n in (49_999, 50_000)] == [True, False]


def test_texts_may_be_asked_for_or_left_out_when_a_job_goes_on(
    source: Path, ranked: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(ranked, folder)
    evaluate(settings(folder, source, scoring=replace(settings(folder).scoring, texts=False)))
    assert scores(folder) == scores(ranked)


def test_the_summary_is_that_of_the_scores_alone(ranked: Path) -> None:
    stored = json.loads((ranked / "summary.json").read_text())
    assert stored == summary.summarise(scores(ranked))


def test_a_finished_job_scores_nothing_again(source: Path, ranked: Path) -> None:
    before = (ranked / "scores.jsonl").stat().st_mtime_ns
    evaluate(settings(ranked, source))
    assert (ranked / "scores.jsonl").stat().st_mtime_ns == before


def test_a_bare_backbone_can_be_scored(tmp_path: Path) -> None:
    assert len(scores(evaluate(settings(tmp_path / "bare")))) == 20


def test_the_average_scores_like_the_averaged_adapter(source: Path, tmp_path: Path) -> None:
    one = evaluate(settings(tmp_path / "one", source, routing="average"))
    mean = AverageConfig(source=str(source), run=RunConfig(folder=str(tmp_path / "mean")))
    two = evaluate(settings(tmp_path / "two", average(mean)))
    for identity, score in by_id(one).items():
        assert by_id(two)[identity]["choice_scores"] == pytest.approx(score["choice_scores"])


def test_routing_off_is_the_bare_backbone_of_the_same_run(source: Path, tmp_path: Path) -> None:
    off = evaluate(settings(tmp_path / "off", source, routing="off"))
    assert scores(off) == scores(evaluate(settings(tmp_path / "bare")))


@pytest.fixture(scope="module")
def averages(source: Path) -> Path:
    run = RunConfig(folder=str(source.parent / "averages"), validate_every=-1)
    average(AverageConfig(source=str(source), steps=(0, 2), run=run))
    return Path(run.folder)


def test_every_number_of_extra_steps_is_scored_beside_the_backbone_and_chance(
    averages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evaluate(settings(tmp_path / "run", averages, extra_steps="all"))
    assert sorted(path.name for path in folder.iterdir()) == ["000000", "000002", "bare"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["task", "k", "=", "0", "k", "=", "2", "bare", "chance"]
    assert table[1].split()[-1] == "20.00"
    for name in ("000000", "000002"):
        alone = evaluate(settings(tmp_path / name, averages / "averaged" / name))
        assert scores(folder / name) == scores(alone)
    assert scores(folder / "bare") == scores(evaluate(settings(tmp_path / "bare")))
    before = (folder / "bare" / "scores.jsonl").stat().st_mtime_ns
    evaluate(settings(tmp_path / "run", averages, extra_steps="all"))
    assert (folder / "bare" / "scores.jsonl").stat().st_mtime_ns == before


def test_a_number_of_extra_steps_that_was_not_made_is_named(
    averages: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="no average of 7 extra steps; there is 0, 2"):
        evaluate(settings(tmp_path / "run", averages, extra_steps=(0, 7)))
    with pytest.raises(AdapterError, match="there is none; name a run of average"):
        evaluate(settings(tmp_path / "run", source, extra_steps="all"))
    assert not list((tmp_path / "run").glob("*"))


def test_extra_steps_and_routing_off_need_an_adapter(tmp_path: Path) -> None:
    for changes in ({"extra_steps": (0,)}, {"routing": "off"}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            settings(tmp_path, **changes)
    with pytest.raises(ConfigError, match="names none"):
        settings(tmp_path, tmp_path, extra_steps=())


def test_held_out_tasks_are_scored_under_the_average(source: Path, tmp_path: Path) -> None:
    tasks = replace(TASKS, fold="held_out")
    folder = evaluate(settings(tmp_path / "run", source, tasks=tasks, routing="average"))
    assert len(json.loads((folder / "summary.json").read_text())["tasks"]) == 10


def test_answers_can_be_generated(source: Path, tmp_path: Path) -> None:
    scoring = ScoringConfig(metric="exact_match", max_new_tokens=8, examples=2)
    folder = evaluate(settings(tmp_path / "run", source, scoring=scoring))
    assert len(scores(folder)) == 8
    assert all(isinstance(score["prediction"], str) for score in scores(folder))


def test_a_task_of_its_own_metric_needs_no_setting(tmp_path: Path) -> None:
    folder = evaluate(settings(tmp_path / "run", scoring=ScoringConfig(max_new_tokens=4)))
    assert {score["metric"] for score in scores(folder)} == {"exact_match"}


# -- bad input -----------------------------------------------------------------------------------


def rows(folder: Path, **fields: object) -> JsonlTasks:
    (folder / "t").mkdir(parents=True)
    row = {"input": "a b", "target": "b a", **fields}
    for fold in ("train", "test"):
        (folder / "t" / f"{fold}.jsonl").write_text(json.dumps({**row, "id": fold}) + "\n")
    return JsonlTasks(suite="jsonl", folder=str(folder))


def test_a_task_without_choices_cannot_be_ranked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task t: example test has no choices to rank"):
        evaluate(settings(tmp_path / "run", tasks=rows(tmp_path / "rows")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_hidden_or_out_of_range_is_refused(tmp_path: Path, label: int) -> None:
    tasks = rows(tmp_path / "rows", choices=["b a", "a b"], label=label)
    with pytest.raises(DataError, match="label"):
        evaluate(settings(tmp_path / "run", tasks=tasks))
    assert not (tmp_path / "run").exists()


def test_a_task_without_rows_is_named(tmp_path: Path) -> None:
    tasks = rows(tmp_path / "rows")
    (tmp_path / "rows" / "t" / "test.jsonl").unlink()
    with pytest.raises(DataError, match="task t: no test row and no held-out row"):
        evaluate(settings(tmp_path / "run", tasks=tasks))


def test_an_adapter_of_another_backbone_is_refused(source: Path, tmp_path: Path) -> None:
    from transformers import T5Config

    other = tmp_path / "other"
    shutil.copytree(ROOT / "mhr_scale" / "tasks" / "toy_backbone", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_layers": 1}))
    assert T5Config.from_pretrained(other).num_layers == 1
    with pytest.raises(AdapterError, match="made for another backbone"):
        evaluate(settings(tmp_path / "run", source, backbone_moved_to=str(other)))
    assert not (tmp_path / "run").exists()


def test_unknown_tasks_under_their_own_routing_are_refused(source: Path, tmp_path: Path) -> None:
    tasks = replace(TASKS, fold="held_out")
    with pytest.raises(AdapterError, match="set routing: average"):
        evaluate(settings(tmp_path / "run", source, tasks=tasks))


def test_another_job_in_the_same_folder_is_refused(source: Path, ranked: Path) -> None:
    with pytest.raises(RunError, match=r"scores of other settings \(routing was own, is average\)"):
        evaluate(settings(ranked, source, routing="average"))


def test_an_adapter_and_a_backbone_are_one_too_many(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="brings its backbone"):
        settings(tmp_path, source, backbone=BARE)


def test_a_rank_that_judges_nothing_keeps_no_texts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path / "run", source)
    opened = open_backbone(
        open_adapter_of(config)[2], ds_config=None, timeout_seconds=60.0, recipe=config
    )
    asked = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        asked.append(read_questions(config, None, opened))
    first, second = asked
    assert [q.id for q in second.questions] == [q.id for q in first.questions]
    assert [(q.example.input, q.example.choices) for q in second.questions] == [("", ())] * 20
    assert all(q.example.input for q in first.questions)
    assert (len(first.tasks), second.tasks) == (4, [])
    assert first.inputs == second.inputs
    assert [r.input_ids.tolist() for r in second.rows] == [r.input_ids.tolist() for r in first.rows]
