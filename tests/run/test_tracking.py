"""Trackers get what metrics.jsonl gets, and stop no run."""

import fcntl
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import ROOT, read_metrics
from tracked import (
    expected,
    mlflow_shown,
    put_in_place,
    tensorboard_steps,
    trackio_shown,
    wandb_history,
    wandb_records,
)

from mhr_scale.config import AdaptRunConfig, FinetuneRunConfig, PretrainConfig, RunConfig
from mhr_scale.errors import ConfigError
from mhr_scale.recipe.reading import load
from mhr_scale.run import trackers, tracking
from mhr_scale.run.runlog import Metrics
from mhr_scale.run.trackers import Curves, kept_id, mlflow_name
from mhr_scale.run.tracking import Tracking
from mhr_scale.verbs.pretrain import pretrain

SHORT = (
    "schedule.steps=4",
    "run.log_every=1",
    "run.save_every=2",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "tasks.n_tasks=4",
    "tasks.train_examples=10",
    "tasks.validation_examples=2",
)
BOTH = "run.trackers=[tensorboard, wandb]"


def wandb_id(folder: Path) -> str:
    return kept_id(folder, "wandb", lambda: str(folder))


def recipe(folder: Path, *overrides: str) -> PretrainConfig:
    words = [*SHORT, f"run.folder={folder}", *overrides]
    return load(PretrainConfig, ROOT / "launch" / "recipes" / "toy.yaml", words)


# -- a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is saved at step 2, loses what it logged later, and goes on to step 4."""
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("DS_ACCELERATOR", "cpu")
    folder = tmp_path_factory.mktemp("runs") / "toy"
    pretrain(recipe(folder, BOTH))
    for late in (folder / "steps").glob("000004*"):
        late.rename(late.with_name("lost"))
    pretrain(recipe(folder, BOTH))
    patch.undo()
    return folder


def test_tensorboard_shows_every_step_of_a_resumed_run_once(resumed: Path) -> None:
    assert len(list((resumed / "tensorboard").iterdir())) == 2
    shown = tensorboard_steps(resumed)
    assert [step for step, _ in shown["loss"]] == [1, 2, 3, 4]
    assert shown == expected(resumed)
    assert sum(name.startswith("validation_loss_by_task/") for name in shown) == 4


def test_wandb_gets_every_line_under_one_id(resumed: Path) -> None:
    files = sorted(
        resumed.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime
    )
    first, second = (wandb_history(file) for file in files)
    assert [row["_step"] for row in first] == ["0", "1", "2", "3", "4"]
    assert [row["_step"] for row in second] == ["3", "4"]
    losses = {line["step"]: line["loss"] for line in read_metrics(resumed) if "loss" in line}
    assert {int(row["_step"]): float(row["loss"]) for row in first[1:]} == losses
    runs = [
        record.run for file in files for record in wandb_records(file) if record.HasField("run")
    ]
    assert {run.run_id for run in runs} == {wandb_id(resumed)}
    assert {run.display_name for run in runs} == {"toy"}


def test_without_trackers_nothing_of_theirs_is_imported() -> None:
    code = (
        "import sys, mhr_scale.training.opening, mhr_scale.verbs.finetune; "
        "from mhr_scale.run import tracking; tracking.check(()); "
        "context = tracking.Tracking(()).opened(None); assert context.__enter__() is None; "
        "assert not {'tensorboard', 'wandb', 'trackio', 'mlflow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- jobs side by side, in trackers that append what they are sent ---------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both keep what they are sent on this machine, in the run folder and in this one."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        patch.delenv(name, raising=False)
    for name, value in trackers.MLFLOW_PATIENCE.items():
        patch.setenv(name, value)  # so that they are as before afterwards
    yield tmp_path_factory.mktemp("local")
    patch.undo()


JOBS = ("copy it/0/MHR", "sort/0/MHR")


def start_jobs(run: Path, kind: str, *, resume_step: int, steps: Iterable[int]) -> None:
    """A start of two jobs that step together, each with a line for a step and one for its score."""
    tracking, whole = Tracking((kind,)), []
    with ExitStack() as opened:
        for job in JOBS:
            folder = run / "jobs" / job
            folder.mkdir(parents=True, exist_ok=True)
            curves = Curves(folder=folder, resume_step=resume_step, job=job, run=run)
            track = opened.enter_context(tracking.opened(curves))
            assert track is not None
            whole.append(Metrics(folder / "metrics.jsonl", resume_step=resume_step, also=track))
        if resume_step > 0:  # a score that the earlier start had no time for
            for metrics in whole:
                metrics.write({"step": resume_step, "score": 50.0})
        for step in steps:
            for number, metrics in enumerate(whole):
                metrics.write({"step": step, "loss": step + number / 2, "of": {"a/b(c)": 1.0}})
                if step % 2 == 0:
                    metrics.write({"step": step, "score": 10.0 * step})


@pytest.mark.parametrize("is_real", [True, False], ids=["real", "stand-in"])
@pytest.mark.parametrize("kind", ["trackio", "mlflow"])
def test_jobs_that_go_on_twice_send_every_number_once(
    kind: str,
    is_real: bool,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_in_place(monkeypatch, kind, is_real=is_real)
    run = local / f"{kind}_{is_real}" / "adapted"
    start_jobs(run, kind, resume_step=-1, steps=range(1, 8))
    start_jobs(run, kind, resume_step=3, steps=range(4, 6))  # and dies before it saves
    start_jobs(run, kind, resume_step=3, steps=range(4, 10))
    for job in JOBS:
        folder = run / "jobs" / job
        made = expected(folder)
        if kind == "mlflow":
            made = {mlflow_name(name): curve for name, curve in made.items()}
            shown = mlflow_shown(folder, run, made)
        else:
            shown = trackio_shown(folder, run.parent.name)
        assert {name: sorted(curve) for name, curve in shown.items()} == made
        assert [step for step, _ in made["score"]] == [2, 3, 4, 6, 8]
    assert "run.trackers" not in caplog.text
    assert capsys.readouterr().out == ""


def test_one_rank_at_a_time_makes_the_tables_of_mlflow(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch, "mlflow", is_real=False)
    client: Any = importlib.import_module("mlflow").MlflowClient
    opened, was_held = client.__init__, []

    def watched(self: Any, tracking_uri: str) -> None:
        with (tmp_path / "mlflow" / "making").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                was_held.append(False)
            except BlockingIOError:
                was_held.append(True)
        opened(self, tracking_uri)

    monkeypatch.setattr(client, "__init__", watched)
    with Tracking(("mlflow",)).opened(Curves(folder=tmp_path, resume_step=-1)) as track:
        assert track is not None
    assert was_held == [True]


# -- at the door -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(trackers.KINDS))
@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)])
def test_a_missing_package_is_told_before_anything_is_written(
    name: str, found: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    fake = {name: found}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: fake[n] if n in fake else real(n, *rest)
    )
    with pytest.raises(ConfigError, match=rf"'{name}' is .*; pip install .mhr_scale\[trackers"):
        pretrain(recipe(tmp_path / "run", f"run.trackers=[{name}]"))
    assert not (tmp_path / "run").exists()


def test_the_packages_of_a_local_database_are_asked_for_where_there_is_no_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = SimpleNamespace(origin="somewhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "alembic" else there)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="'alembic' is not installed"):
        tracking.check(("mlflow",))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    tracking.check(("mlflow",))


def test_a_tracker_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.trackers.* 'mlfow' .*did you mean 'mlflow'"):
        recipe(tmp_path, "run.trackers=[mlfow]")


@pytest.mark.parametrize("schema", [RunConfig, FinetuneRunConfig, AdaptRunConfig])
def test_a_tracker_that_stands_twice_is_refused(schema: Any) -> None:
    with pytest.raises(ConfigError, match="'wandb' stands twice"):
        schema(folder="x", trackers=("wandb", "wandb"))


def test_trackers_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "schedule.steps=2")
    pretrain(config)
    changed = replace(config, run=replace(config.run, trackers=("tensorboard",)))
    assert pretrain(changed).is_dir()


# -- a tracker that fails --------------------------------------------------------------------------


class Failing:
    """A tracker that breaks at one of its calls."""

    def __init__(self, curves: Curves) -> None:
        self.calls: list[str] = []
        self.call("open")

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name == Failing.at:
            raise OSError(f"{name}: the service is gone\nand more")

    at = ""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.call("log")

    def close(self) -> None:
        self.call("close")


@pytest.mark.parametrize("at", ["open", "log", "close"])
def test_a_tracker_that_fails_is_told_once_and_the_record_is_whole(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(trackers.KINDS, "wandb", Failing)
    monkeypatch.setattr(Failing, "at", at)
    with (
        caplog.at_level(logging.WARNING, "mhr_scale"),
        Tracking(("wandb",)).opened(Curves(folder=tmp_path, resume_step=-1)) as track,
    ):
        metrics = Metrics(tmp_path / "metrics.jsonl", resume_step=-1, also=track)
        for step in range(3):
            metrics.write({"step": step, "loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    assert [record.message for record in caplog.records] == [
        "run.trackers: wandb failed and is left out, metrics.jsonl has everything: "
        f"{at}: the service is gone"
    ]


def test_a_tracker_that_failed_for_a_job_is_left_out_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Failing] = []

    def make(curves: Curves) -> Failing:
        made.append(Failing(curves))
        return made[-1]

    monkeypatch.setitem(trackers.KINDS, "wandb", make)
    monkeypatch.setattr(Failing, "at", "log")
    tracking, curves = Tracking(("wandb",)), Curves(folder=tmp_path, resume_step=-1)
    with tracking.opened(curves) as one, tracking.opened(curves) as other:
        assert one is not None
        assert other is not None
        for take in (one, other):
            take({"step": 1})
    with tracking.opened(curves) as later:
        assert later is None
    assert [failing.calls for failing in made] == [["open", "log"], ["open"]]
    assert len(caplog.records) == 1


def test_a_run_that_fails_closes_its_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Failing] = []

    def make(curves: Curves) -> Failing:
        made.append(Failing(curves))
        return made[-1]

    monkeypatch.setitem(trackers.KINDS, "wandb", make)
    with (
        pytest.raises(RuntimeError, match="the run"),
        Tracking(("wandb",)).opened(Curves(folder=tmp_path, resume_step=-1)),
    ):
        raise RuntimeError("the run")
    assert made[0].calls == ["open", "close"]


# -- small parts -----------------------------------------------------------------------------------


def test_objects_inside_a_line_become_paths() -> None:
    line = {"step": 1, "a": {"b": 2.0, "c": {"d": 3}}, "name": "x", "none": None}
    assert tracking.numbers_of(line) == {"step": 1, "a/b": 2.0, "a/c/d": 3}


def test_names_become_such_as_mlflow_takes() -> None:
    given = ("loss", "by_task/it's (a) task", "a//../b.", "x" * 300)
    assert [mlflow_name(name) for name in given] == [
        "loss",
        "by_task/it_s _a_ task",
        "a/_/_/b",
        "x" * 250,
    ]


def test_the_id_of_a_run_folder_moves_with_it(tmp_path: Path) -> None:
    first = wandb_id(tmp_path / "one")
    assert first == wandb_id(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert first == wandb_id(tmp_path / "two")
    assert first != wandb_id(tmp_path / "three")
