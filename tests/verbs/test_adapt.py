"""The verb `adapt`: what jobs leave, which of their checkpoints they keep, the table."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from processes import read_metrics
from small_runs import (
    BARE,
    LORA,
    TASKS,
    adapter_bytes,
    job_folders,
    make_config,
    make_source,
    onto,
    results,
    write_rows,
)

from mhr_scale.adapters import artefact
from mhr_scale.config import (
    AdaptConfig,
    EvaluateConfig,
    JsonlTasks,
    OptimConfig,
    PlainRunConfig,
    ScoringConfig,
    SelectionConfig,
    ShotsConfig,
    SoupConfig,
    ToyTasks,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.errors import DivergenceError
from mhr_scale.jobs.wave import Wave
from mhr_scale.scores import comparison, summary
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("few_shot")


@pytest.fixture(scope="module")
def source(base) -> Path:
    return make_source(base / "source")


@pytest.fixture(scope="module")
def rows(base) -> Path:
    return write_rows(base / "rows")


def kinds(source: Path) -> dict[str, VariantConfig]:
    path = str(source)
    return {
        "MHR": VariantConfig(adapter=path),
        "MHR-z": VariantConfig(adapter=path, kind="routing"),
        "MHR-mu": VariantConfig(adapter=path, kind="average", lr=1e-2),
        "LoRA": LORA,
    }


@pytest.fixture(scope="module")
def config(base, source, rows) -> AdaptConfig:
    return make_config(base / "run", rows, kinds(source))


@pytest.fixture(scope="module")
def run(config) -> Path:
    return adapt(config)


@pytest.fixture(scope="module")
def two(config) -> AdaptConfig:
    """The same with two variants only."""
    return replace(config, variants={name: config.variants[name] for name in ("MHR", "MHR-mu")})


# --- what is written


def test_there_is_a_job_for_every_task_seed_and_variant(run):
    names = {(t, "0", v) for t in TASKS for v in ("MHR", "MHR-z", "MHR-mu", "LoRA")}
    assert set(job_folders(run)) == set(results(run)) == names


def test_a_finished_job_leaves_adapter_metrics_scores_and_result_alone(run):
    for folder in job_folders(run).values():
        assert {path.name for path in folder.iterdir()} == {
            "adapter",
            "metrics.jsonl",
            "scores.jsonl",
            "result.json",
        }


def test_metrics_have_every_step_and_every_evaluation_once(run):
    for folder in job_folders(run).values():
        lines = read_metrics(folder)
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
        assert [line["step"] for line in lines if "score" in line] == [0, 2, 4, 6]
        parts = [line for line in lines if "loss" in line]
        assert all(
            line["loss"] == pytest.approx(sum(line[k] for k in ("lm", "mc", "ul")))
            for line in parts
        )
        assert all(math.isfinite(line["grad_norm"]) for line in parts)


def test_a_result_says_what_its_job_was(run, source):
    sources = {"MHR": str(source), "MHR-z": str(source), "MHR-mu": str(source), "LoRA": None}
    for (task, seed, variant), result in results(run).items():
        assert (result["task"], str(result["seed"]), result["variant"]) == (task, seed, variant)
        assert (result["adapter"], result["steps"]) == (sources[variant], 6)
        assert (result["metric"], result["examples"]) == ("accuracy", 12)


def test_a_result_counts_what_was_trained_in_the_source_and_in_the_job(run):
    """24 linears of 64 x 64, rank 2, 4 skills; 24 routing tables of 8 x 4."""
    pair = 24 * 2 * (64 + 64)
    counts = {
        "MHR": (4 * pair, 4 * pair + 24 * 32),
        "MHR-z": (4 * pair, 24 * 32),
        "MHR-mu": (4 * pair, pair),
        "LoRA": (0, pair),
    }
    for (_, _, variant), result in results(run).items():
        assert (result["source_numbers"], result["trained_numbers"]) == counts[variant]


def test_the_score_is_the_mean_of_the_stored_points(run):
    for key, folder in job_folders(run).items():
        scores = summary.read_scores(folder / "scores.jsonl")
        assert len(scores) == 12
        mean = sum(score["points"] for score in scores) / 12
        assert results(run)[key]["score"] == pytest.approx(mean)


def test_the_summary_is_made_from_the_results(run):
    found = comparison.compare(list(results(run).values()))
    stored = json.loads((run / "summary.json").read_text())
    assert stored["variants"].keys() == found["variants"].keys()
    assert all(stored["variants"][name] == found["variants"][name] for name in found["variants"])
    assert stored["tasks"] == found["tasks"]


# --- the adapters can be used


@pytest.mark.parametrize("variant", ["MHR", "MHR-z", "MHR-mu", "LoRA"])
def test_a_job_s_adapter_scores_the_same_under_the_verb_evaluate(
    run, rows, config, tmp_path, variant
):
    task = TASKS[1]
    only = tmp_path / "rows"
    only.mkdir()
    (only / task).symlink_to(rows / task)
    job = run / "jobs" / task / "0" / variant
    folder = evaluate(
        EvaluateConfig(
            adapter=str(job),
            tasks=JsonlTasks(suite="jsonl", folder=str(only)),
            scoring=config.scoring,
            run=PlainRunConfig(folder=str(tmp_path / "again")),
        )
    )
    first, again = (
        {score["id"]: score for score in summary.read_scores(place / "scores.jsonl")}
        for place in (job, folder)
    )
    assert first.keys() == again.keys()
    for identity, score in first.items():
        assert again[identity]["points"] == score["points"]
        assert again[identity]["choice_scores"] == pytest.approx(score["choice_scores"], rel=1e-4)
    mean = json.loads((folder / "summary.json").read_text())["tasks"][task]["mean"]
    assert results(run)[task, "0", variant]["score"] == pytest.approx(mean)


def test_a_job_s_adapter_knows_its_task_its_step_and_its_backbone(run):
    for (task, _, _), folder in job_folders(run).items():
        card = artefact.read_card(folder)
        assert card.task_names == (task,)
        assert card.step == json.loads((folder / "result.json").read_text())["best_step"]
        assert card.backbone["name"] == "builtin:toy"
        assert card.origin["job"] == "/".join(folder.parts[-3:])


# --- which checkpoint is kept


def evaluations(run: Path) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
    return {key: [tuple(e) for e in found["evaluations"]] for key, found in results(run).items()}


def test_the_first_of_the_best_evaluations_is_kept(run):
    for key, found in evaluations(run).items():
        best = max(score for _, score in found)
        first = next(step for step, score in found if score == best)
        assert (results(run)[key]["best_step"], results(run)[key]["score"]) == (first, best)


def test_the_kept_adapter_is_the_one_that_the_best_step_left(two, run, tmp_path):
    """Steps of a constant schedule do not depend on how many are to come."""
    best = {key: r["best_step"] for key, r in results(run).items() if key[2] in two.variants}
    assert 0 < min(best.values()) < 6
    for steps in set(best.values()):
        shorter = replace(two, protocol=replace(two.protocol, steps=steps))
        folder = tmp_path / str(steps)
        last = adapter_bytes(adapt(onto(shorter, folder, selection=SelectionConfig(on="last"))))
        for key in (key for key, step in best.items() if step == steps):
            assert adapter_bytes(run)[key] == last[key]


def test_without_selection_the_last_step_is_scored_and_kept(two, tmp_path):
    folder = adapt(onto(two, tmp_path / "run", selection=SelectionConfig(on="last")))
    for key, found in results(folder).items():
        assert (found["best_step"], found["evaluations"], found["steps"]) == (6, [], 6)
        assert len(summary.read_scores(job_folders(folder)[key] / "scores.jsonl")) == 12


def test_own_tasks_select_on_held_out_rows_where_they_have_some_beside_the_reported_ones(
    two, rows, tmp_path
):
    folder = tmp_path / "rows"
    shutil.copytree(rows, folder)
    (folder / TASKS[0] / "test.jsonl").unlink()
    own = JsonlTasks(suite="jsonl", folder=str(folder))
    by_default = replace(two, tasks=own, selection=SelectionConfig(every_epochs=1))
    run = adapt(onto(by_default, tmp_path / "run", variants={"MHR": two.variants["MHR"]}))
    found = {task: result for (task, _, _), result in results(run).items()}
    assert {task: result["selected_on"] for task, result in found.items()} == {
        TASKS[0]: "last",
        TASKS[1]: "validation",
    }
    stored = json.loads((run / "summary.json").read_text())
    assert stored["selected_on"] == {TASKS[0]: "last", TASKS[1]: "validation"}
    assert found[TASKS[0]]["evaluations"] == []
    assert [step for step, _ in found[TASKS[1]]["evaluations"]] == [0, 2, 4, 6]


@pytest.mark.parametrize("on", ["validation", "shots"])
def test_rows_that_select_are_others_than_those_that_count(two, tmp_path, on):
    shots = ShotsConfig(seeds=(0,), count=10, set_aside=2)
    selection = SelectionConfig(on=on, every_epochs=1, at_start=False)
    folder = adapt(onto(two, tmp_path / "run", selection=selection, shots=shots))
    n_rows = {"validation": 5, "shots": 2}[on]
    for key, found in evaluations(folder).items():
        assert [step for step, _ in found] == [2, 4, 6]
        assert all((score * n_rows / 100).is_integer() for _, score in found)
        scores = summary.read_scores(job_folders(folder)[key] / "scores.jsonl")
        assert {score["example"].split(":")[1] for score in scores} == {"test"}
        best = next(step for step, score in found if score == max(s for _, s in found))
        assert results(folder)[key]["best_step"] == best
        assert results(folder)[key]["selected_on"] == on


def test_selecting_on_other_rows_changes_no_training(two, run, tmp_path):
    last = SelectionConfig(on="validation", every_epochs=2, at_start=False)
    folder = adapt(onto(two, tmp_path / "run", selection=last))
    for key, path in job_folders(folder).items():
        losses, expected = (
            [line["loss"] for line in read_metrics(place) if "loss" in line]
            for place in (path, job_folders(run)[key])
        )
        assert losses == expected


def test_patience_ends_a_job_that_gets_no_better(two, source, tmp_path):
    frozen = {"still": VariantConfig(adapter=str(source), lr=0.0, routing_lr=0.0)}
    selection = replace(two.selection, patience=2)
    run = adapt(onto(two, tmp_path / "run", variants=frozen, selection=selection))
    for key, found in results(run).items():
        assert (found["best_step"], found["steps"]) == (0, 4)
        assert [step for step, _ in evaluations(run)[key]] == [0, 2, 4]
        assert [line["step"] for line in read_metrics(job_folders(run)[key])][-1] == 4


# --- other settings


def test_a_variant_has_its_own_number_of_steps_and_rates(two, source, tmp_path):
    variants = {
        "long": VariantConfig(adapter=str(source)),
        "short": VariantConfig(adapter=str(source), steps=3, lr=0.0, routing_lr=0.0),
    }
    run = adapt(onto(two, tmp_path / "run", variants=variants))
    assert {key[2]: found["steps"] for key, found in results(run).items()} == {
        "long": 6,
        "short": 3,
    }
    rates = {
        key[2]: {line["lr"] for line in read_metrics(path) if "lr" in line}
        for key, path in job_folders(run).items()
    }
    assert rates == {"long": {2e-2}, "short": {0.0}}


def test_held_out_toy_tasks_are_generated_and_cut_to_a_few_rows(two, tmp_path):
    small = onto(
        two,
        tmp_path / "run",
        variants={"LoRA": LORA},
        backbone=BARE,
        tasks=ToyTasks(suite="toy", fold="held_out", train_examples=8),
        protocol=replace(two.protocol, steps=2, loss="language_model"),
        scoring=ScoringConfig(examples=2, max_new_tokens=8),
        selection=SelectionConfig(on="last"),
        optim=OptimConfig(),
    )
    found = results(adapt(small))
    assert len(found) == 10
    assert {(one["metric"], one["examples"]) for one in found.values()} == {("exact_match", 2)}


def test_a_soup_says_what_is_in_it(two, tmp_path):
    private = make_source(
        tmp_path / "private", "adapter.private=true", "adapter.n_skills=1", "adapter.n_splits=1"
    )
    variants = {
        "soup": VariantConfig(
            adapter=str(private), kind="soup", soup=SoupConfig(adapters=2, examples=4)
        )
    }
    run = adapt(onto(two, tmp_path / "run", variants=variants))
    names = set(artefact.read_card(private).task_names)
    for found in results(run).values():
        assert len(found["soup"]) == 2
        assert set(found["soup"]) < names
        assert found["source_numbers"] == 4 * found["trained_numbers"]


# --- jobs that diverge


@pytest.mark.parametrize(
    ("on", "every_epochs"),
    [("test", 1), ("test", 3), ("last", 1)],
    ids=["while-evaluated", "while-training", "in-the-scores-of-the-last-step"],
)
def test_jobs_that_diverge_are_named_and_the_others_are_finished(two, tmp_path, on, every_epochs):
    """One step of rate 1e30: the next loss is no number, nor is a score before it."""
    wild = onto(
        two,
        tmp_path / "run",
        variants={"wild": replace(two.variants["MHR"], lr=1e30), **two.variants},
        protocol=replace(two.protocol, batch_size=8, steps=4 if on == "test" else 1),
        selection=SelectionConfig(on=on, every_epochs=every_epochs, at_start=False),
    )
    message = r"2 job\(s\) given up, .*/0/wild \(step \d\), .*/0/wild \(step \d\); lower optim.lr"
    with pytest.raises(DivergenceError, match=message):
        adapt(wild)
    assert {key[2] for key in results(tmp_path / "run")} == set(two.variants)
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(stored["variants"]) == set(two.variants)


def test_a_job_that_diverges_while_evaluated_changes_nothing_for_the_other_one_of_its_wave(
    two, run, tmp_path, monkeypatch
):
    train_step = Wave.train_step

    def overflow(wave, *arguments, **options):
        """Blow up the tensors of the second job."""
        values = train_step(wave, *arguments, **options)
        if wave.step == 2:
            for parameter in wave.adapter.inventory.parameters():
                parameter.data[:, 1] *= 1e30
        return values

    monkeypatch.setattr(Wave, "train_step", overflow)
    with pytest.raises(DivergenceError, match=r"2 job\(s\) given up"):
        adapt(onto(two, tmp_path / "run", waves=WavesConfig(size=2)))
    assert {key[:2] for key in results(tmp_path / "run")} == {(TASKS[0], "0")}
    for found in json.loads((tmp_path / "run" / "summary.json").read_text())["variants"].values():
        assert (found["seeds"], found["incomplete_seeds"]) == ([], [0])
    for key, found in results(tmp_path / "run").items():
        assert found == results(run)[key]
        assert adapter_bytes(tmp_path / "run")[key] == adapter_bytes(run)[key]
        assert read_metrics(job_folders(tmp_path / "run")[key]) == read_metrics(
            job_folders(run)[key]
        )
