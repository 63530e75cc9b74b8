"""Verbs that are asked to stop save, leave, and go on to what an unstopped run leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import timeless
from small_runs import (
    LORA,
    adapter_bytes,
    contents,
    job_folders,
    make_config,
    make_source,
    onto,
    write_rows,
)
from stopped_runs import check_same, lora, recipe, stopped

from mhr_scale.config import (
    AdaptConfig,
    AverageConfig,
    EvaluateConfig,
    PlainRunConfig,
    RunConfig,
    ScoringConfig,
    SelectionConfig,
    ToyTasks,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.jobs import runner
from mhr_scale.jobs.job_data import JobData
from mhr_scale.jobs.wave import Wave
from mhr_scale.run import stopping
from mhr_scale.training import checkpoint, saved_steps
from mhr_scale.training.trainer import Trainer
from mhr_scale.verbs import evaluate as evaluate_module
from mhr_scale.verbs import finetune as finetune_module
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.average import average
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.finetune import finetune
from mhr_scale.verbs.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("on_cpu")


# -- pretrain and average ------------------------------------------------------------------------


def test_training_stops_after_the_step_and_goes_on(whole: Path, tmp_path: Path) -> None:
    """A step that is due for validation, not for a save."""
    said = stopped(pretrain, recipe(tmp_path), Trainer, "accumulate", 2)
    assert said.startswith("stopped by SIGTERM: step 2 is saved")
    assert saved_steps.complete_steps(tmp_path) == [2]
    pretrain(recipe(tmp_path))
    check_same(tmp_path, whole)


def test_a_step_that_is_saved_anyway_is_saved_once(whole: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *a, **o: calls.append(o["step"]) or save(*a, **o))
        stopped(pretrain, recipe(tmp_path), Trainer, "accumulate", 4)
    assert calls == [4]


def test_a_run_asked_in_its_last_step_is_finished(whole: Path, tmp_path: Path) -> None:
    accumulate = Trainer.accumulate

    def asked(trainer: Trainer, batches: Any) -> Any:
        if trainer.step == 4:
            stopping.ask("SIGTERM")
        return accumulate(trainer, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "accumulate", asked)
        pretrain(recipe(tmp_path))
    check_same(tmp_path, whole)


class Killed(BaseException):
    """What ends a run without warning."""


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(Trainer, "validate", 3), (Trainer, "save", 1), (Trainer, "save", 2)],
)
def test_a_killed_run_has_every_line_once_in_the_end(
    whole: Path, tmp_path: Path, owner: Any, name: str, call: int
) -> None:
    """Before the first save, after it, and after the last one."""
    function, calls = getattr(owner, name), [0]

    def killed(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        result = function(*arguments, **options)
        if calls[0] == call:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            pretrain(recipe(tmp_path))
    pretrain(recipe(tmp_path))
    check_same(tmp_path, whole)


def test_extra_steps_of_an_average_stop_and_go_on(whole: Path, tmp_path: Path) -> None:
    def config(folder: Path) -> AverageConfig:
        run = RunConfig(folder=str(folder), log_every=1, save_every=1, keep=1)
        return AverageConfig(source=str(whole), steps=(0, 1, 4), run=run)

    average(config(tmp_path / "whole"))
    said = stopped(average, config(tmp_path / "run"), Trainer, "accumulate", 3)
    assert "step 3 is saved" in said
    average(config(tmp_path / "run"))
    for name in ("averaged/000001", "averaged/000004", "adapter"):
        mine, theirs = (
            (tmp_path / run / name / "adapter.safetensors").read_bytes() for run in ("run", "whole")
        )
        assert mine == theirs
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


# -- evaluate ------------------------------------------------------------------------------------


def test_scoring_stops_between_batches_and_goes_on_behind_a_torn_line(
    whole: Path, tmp_path: Path
) -> None:
    def config(folder: Path) -> EvaluateConfig:
        return EvaluateConfig(
            adapter=str(whole),
            tasks=ToyTasks(suite="toy", n_tasks=4, train_examples=10, validation_examples=5),
            scoring=ScoringConfig(metric="accuracy", max_tokens=300),
            run=PlainRunConfig(folder=str(folder)),
        )

    evaluate(config(tmp_path / "whole"))
    said = stopped(evaluate, config(tmp_path / "run"), evaluate_module, "judge", 2)
    assert "all answers so far are written" in said
    some, every = (
        (tmp_path / run / "scores.jsonl").read_text().splitlines() for run in ("run", "whole")
    )
    assert set(some) < set(every)
    with (tmp_path / "run" / "scores.jsonl").open("a") as file:
        file.write(every[0][:20])  # a line torn by a kill
    evaluate(config(tmp_path / "run"))
    for name in ("scores.jsonl", "summary.json"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()


# -- finetune ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [(JobData, "batch", 3, [3]), (finetune_module, "judge", 7, [])],
)
def test_fine_tuning_stops_and_goes_on(
    exported: Path, tmp_path: Path, owner: Any, name: str, call: int, saved: list[int]
) -> None:
    finetune(lora(exported, tmp_path / "whole"))
    config = lora(exported, tmp_path / "run")
    if name == "judge":  # in the scores after training: a batch of them is through already
        config = replace(config, scoring=replace(config.scoring, max_tokens=60))
    said = stopped(finetune, config, owner, name, call)
    assert "the same command goes on" in said
    assert saved_steps.complete_steps(tmp_path / "run") == (saved or [4, 6])
    finetune(config)
    for file in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        mine, theirs = ((tmp_path / run / file).read_bytes() for run in ("run", "whole"))
        assert mine == theirs
    points = [
        [json.loads(line)["points"] for line in (tmp_path / run / "scores.jsonl").open()]
        for run in ("run", "whole")
    ]
    assert points[0] == points[1]


# -- adapt ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> AdaptConfig:
    base = tmp_path_factory.mktemp("jobs")
    variants = {"MHR": VariantConfig(adapter=str(make_source(base / "source"))), "LoRA": LORA}
    selection = SelectionConfig(on="validation", every_epochs=1)
    rows = write_rows(base / "rows")
    config = make_config(base / "whole", rows, variants, selection=selection)
    adapt(config)
    return config


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [
        (Wave, "train_step", 3, 3),
        (runner.Runner, "_answer", 1, 0),
        (runner.Runner, "_answer", 2, 2),
        (runner.Runner, "_answer", 5, 6),
    ],
    ids=["step-3", "score-at-start", "score-after-step-2", "score-of-the-best"],
)
def test_jobs_stop_at_steps_and_amid_scores_and_go_on(
    jobs: AdaptConfig, tmp_path: Path, owner: Any, name: str, call: int, saved: int
) -> None:
    config = onto(jobs, tmp_path, waves=WavesConfig(size=4, save_every=100))
    said = stopped(adapt, config, owner, name, call)
    assert "the jobs of this rank are saved" in said
    steps = {saved_steps.find_resume(folder) or 0 for folder in job_folders(tmp_path).values()}
    assert max(steps) == saved
    adapt(config)
    whole = Path(jobs.run.folder)
    assert contents(tmp_path) == contents(whole)


def test_a_damaged_save_of_a_job_starts_the_job_anew(
    jobs: AdaptConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = onto(jobs, tmp_path, waves=WavesConfig(size=4, save_every=2))
    stopped(adapt, config, Wave, "train_step", 3)
    folder = next(iter(job_folders(tmp_path).values()))
    (folder / "steps" / "000003" / "adapter.safetensors").write_bytes(b"torn")
    adapt(config)
    assert "adapter.safetensors: 4 bytes" in caplog.text
    assert "starting anew" in caplog.text
    assert adapter_bytes(tmp_path) == adapter_bytes(Path(jobs.run.folder))
    assert not any(tmp_path.rglob("*.damaged"))
