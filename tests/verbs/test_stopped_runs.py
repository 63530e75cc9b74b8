"""Verbs that are asked to stop save, leave, and go on to what an unstopped run leaves."""

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import read_metrics
from safetensors.torch import load_file, save_file
from small_runs import (
    BARE,
    LORA,
    TOY,
    adapter_bytes,
    contents,
    job_folders,
    make_config,
    make_source,
    onto,
    write_rows,
)

from mhr_scale import checkpoint, sealing, stopping
from mhr_scale.adapters import AdapterConfig, attach
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.adapters.interop import open_adapter, write_peft_lora
from mhr_scale.backbone import read_blueprint
from mhr_scale.config import (
    AdaptConfig,
    AverageConfig,
    EvaluateConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    FinetuneShotsConfig,
    PlainRunConfig,
    PretrainConfig,
    ProtocolConfig,
    RunConfig,
    ScoringConfig,
    SelectionConfig,
    ToyTasks,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.engine import Engine
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.jobs import runner
from mhr_scale.jobs.data import JobData
from mhr_scale.jobs.wave import Wave
from mhr_scale.launching import main
from mhr_scale.recipe import load
from mhr_scale.trainer import Trainer
from mhr_scale.verbs import evaluate as evaluate_module
from mhr_scale.verbs import finetune as finetune_module
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.average import average
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.finetune import finetune
from mhr_scale.verbs.pretrain import pretrain

TIMES = ("seconds", "tokens_per_second")
SETTINGS = (
    "adapter={n_skills: 3, rank: 2, policy: noisy}",
    "schedule.steps=5",
    "schedule.warmup_fraction=0.2",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "tasks.n_tasks=4",
    "tasks.train_examples=10",
    "tasks.validation_examples=2",
    "run.log_every=1",
    "run.save_every=4",
    "run.validate_every=2",
)


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(autouse=True)
def _unasked() -> Iterator[None]:
    stopping.forget()
    yield
    stopping.forget()


def stopped(verb: Any, config: Any, owner: object, name: str, call: int) -> str:
    """Run a verb that is asked to stop in the so-many-th call of a function; what it says."""
    function, calls = getattr(owner, name), [0]

    def asked(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            stopping.ask("SIGTERM")
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, asked)
        with pytest.raises(stopping.Stopped) as caught:
            verb(config)
    stopping.forget()
    return str(caught.value)


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in read_metrics(folder)
    ]


# -- pretrain and average ------------------------------------------------------------------------


def recipe(folder: Path, *overrides: str) -> PretrainConfig:
    return load(PretrainConfig, TOY, [*SETTINGS, f"run.folder={folder}", *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("stopped") / "whole"
    pretrain(recipe(folder))
    return folder


def check_same(folder: Path, whole: Path) -> None:
    for name in ("adapter/adapter.safetensors", "steps/000005/resume/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert timeless(folder) == timeless(whole)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_training_stops_after_the_step_and_goes_on(whole: Path, tmp_path: Path, step: int) -> None:
    said = stopped(pretrain, recipe(tmp_path), Trainer, "accumulate", step)
    assert said == f"stopped by SIGTERM: step {step} is saved; the same command goes on"
    assert checkpoint.complete_steps(tmp_path) == [step]
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
    [(Trainer, "validate", 1), (Trainer, "validate", 3), (Trainer, "save", 1), (Trainer, "save", 2)]
    + [(Trainer, "accumulate", call) for call in (1, 2, 5)],
)
def test_a_killed_run_has_every_line_once_in_the_end(
    whole: Path, tmp_path: Path, owner: Any, name: str, call: int
) -> None:
    """Whatever was going on: a validation, a save, a step before the first save."""
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


def test_scoring_stops_between_batches_and_goes_on(whole: Path, tmp_path: Path) -> None:
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
    texts = [(tmp_path / run / "scores.jsonl").read_text() for run in ("run", "whole")]
    assert texts[1].startswith(texts[0])
    assert 0 < len(texts[0]) < len(texts[1])
    evaluate(config(tmp_path / "run"))
    for name in ("scores.jsonl", "summary.json"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()


# -- finetune ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    blueprint = read_blueprint(BARE)
    model = Engine({}, timeout_seconds=60).build(BARE, blueprint)
    settings = AdapterConfig(layout="full", rank=2, n_skills=2)
    adapter = mean_of(attach(model, settings, tasks=["a"]))
    folder = tmp_path_factory.mktemp("exported") / "lora"
    return write_peft_lora(adapter, folder, base_model=str(blueprint.folder))


def lora(exported: Path, folder: Path) -> FinetuneConfig:
    return FinetuneConfig(
        adapter=str(exported),
        backbone=BARE,
        tasks=ToyTasks(suite="toy", fold="held_out"),
        task="sort.plus4.after",
        shots=FinetuneShotsConfig(seed=0, count=16),
        protocol=ProtocolConfig(
            steps=6, loss="language_model", max_input_tokens=32, max_target_tokens=32
        ),
        optim=FinetuneOptimConfig(name="adamw", lr=5e-3),
        scoring=ScoringConfig(metric="accuracy", examples=6),
        run=FinetuneRunConfig(folder=str(folder), log_every=1, save_every=4),
    )


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [(JobData, "batch", 3, [3]), (JobData, "batch", 5, [4, 5]), (finetune_module, "judge", 7, [])],
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
    assert checkpoint.complete_steps(tmp_path / "run") == (saved or [4, 6])
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
        (Wave, "train_step", 1, 1),
        (Wave, "train_step", 3, 3),
        (runner.Runner, "_answer", 1, 0),
        (runner.Runner, "_answer", 2, 2),
        (runner.Runner, "_answer", 5, 6),
    ],
    ids=["step-1", "step-3", "score-at-start", "score-after-step-2", "score-of-the-best"],
)
def test_jobs_stop_at_steps_and_amid_scores_and_go_on(
    jobs: AdaptConfig, tmp_path: Path, owner: Any, name: str, call: int, saved: int
) -> None:
    config = onto(jobs, tmp_path, waves=WavesConfig(size=4, save_every=100))
    said = stopped(adapt, config, owner, name, call)
    assert "the jobs of this rank are saved" in said
    steps = {checkpoint.find_resume(folder) or 0 for folder in job_folders(tmp_path).values()}
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


# -- damage and full disks -----------------------------------------------------------------------


def test_a_damaged_save_is_set_aside_and_the_one_before_counts(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    with (folder / "steps/000005/resume/optimizer.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff\xff\xff")
    pretrain(recipe(folder))
    assert "optimizer.safetensors: damaged" in caplog.text
    assert "going on from step 4" in caplog.text
    assert (folder / "steps" / "000005.damaged").is_dir()
    check_same(folder, whole)


def test_without_a_whole_save_the_run_stops_and_names_the_file(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step in folder.glob("steps/*"):
        (step / "adapter.json").unlink()
    before = sorted(path.name for path in folder.glob("steps/*"))
    with pytest.raises(RunError, match=r"adapter\.json: missing.*no saved step is whole"):
        pretrain(recipe(folder))
    assert sorted(path.name for path in folder.glob("steps/*")) == before


@pytest.mark.parametrize(
    ("keep_best", "kept"), [("true", [2, 5]), ("false", [5])], ids=["best", "newest"]
)
def test_the_save_with_the_lowest_validation_loss_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_best: str, kept: list[int]
) -> None:
    def validate(trainer: Trainer) -> dict[str, Any]:
        return {"validation_loss": abs(trainer.step - 2.0), "validation_loss_by_task": {}}

    monkeypatch.setattr(Trainer, "validate", validate)
    every = ("run.save_every=1", "run.validate_every=1", "run.keep=1")
    pretrain(recipe(tmp_path, *every, f"run.keep_best={keep_best}"))
    assert checkpoint.complete_steps(tmp_path) == kept


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files of this process may not grow beyond `limit` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_last_save_is_whole(whole: Path, tmp_path: Path) -> None:
    """The save fails in the background; the next step, or the end of the run, says so."""
    stopped(pretrain, recipe(tmp_path), Trainer, "accumulate", 3)
    with (
        small_files(60_000),
        pytest.raises(RunError, match=r"ulimit -f.*; step 3 is saved and whole; the same command"),
    ):
        pretrain(recipe(tmp_path))
    assert checkpoint.complete_steps(tmp_path) == [3]
    assert checkpoint.find_whole(tmp_path) == 3
    assert not any(tmp_path.rglob("*.tmp"))
    pretrain(recipe(tmp_path))
    check_same(tmp_path, whole)


def test_a_full_disk_under_fine_tuning_is_one_line(exported: Path, tmp_path: Path) -> None:
    config = lora(exported, tmp_path)
    with (
        small_files(20_000),
        pytest.raises(RunError, match=r"000004: not saved: .*; nothing is saved yet"),
    ):
        finetune(config)
    assert not any(tmp_path.glob("steps/*"))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EIO, "the disk failed"),
    ],
)
def test_a_disk_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def flush(path: Path) -> None:
        raise OSError(number, "no", str(path))

    monkeypatch.setattr(sealing, "flush", flush)
    with pytest.raises(RunError, match=f"{words}.*; nothing is saved yet"):
        pretrain(recipe(tmp_path))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "error: memory is used up"),
        (FileNotFoundError(2, "gone", "rows.arrow"), "error: rows.arrow: is not there"),
    ],
)
def test_memory_and_files_that_are_gone_are_one_line_and_exit_code_two(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    words: str,
) -> None:
    accumulate = Trainer.accumulate

    def fail(trainer: Trainer, batches: Any) -> Any:
        if trainer.step == 4:
            raise error
        return accumulate(trainer, batches)

    monkeypatch.setattr(Trainer, "accumulate", fail)
    argv = ["pretrain.py", TOY, *SETTINGS, f"run.folder={tmp_path}"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as left:
        main(PretrainConfig, pretrain, usage="pretrain")
    assert left.value.code == 2
    assert words in capsys.readouterr().err
    assert checkpoint.find_whole(tmp_path) == 4


# -- what others may have written ----------------------------------------------------------------


class Payload:
    """What runs code when a pickle is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def test_code_in_a_saved_optimizer_is_not_run(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = lora(exported, tmp_path / "run")
    stopped(finetune, config, JobData, "batch", 3)
    folder = tmp_path / "run" / "steps" / "000003"
    torch.save(Payload(), folder / "optimizer.pt")
    (folder / "DONE").write_text("")  # a save that is whole, by its own account
    with pytest.raises(RunError, match="000003: cannot go on from it"):
        finetune(config)
    assert not (tmp_path / "owned").exists()


def test_a_lora_with_numbers_that_are_none_is_refused_with_the_list(
    exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    spoilt = sorted(tensors)[3]
    tensors[spoilt].view(-1)[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(AdapterError) as caught:
        finetune(lora(tmp_path / "lora", tmp_path / "run"))
    assert f"1 tensor(s) hold NaN or infinity: {spoilt}" in str(caught.value)
    with pytest.raises(AdapterError, match=r"NaN|finite"):
        open_adapter(str(tmp_path / "lora"))
