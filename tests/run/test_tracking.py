"""Trackers get what metrics.jsonl gets, and stop no run."""

import importlib.util
import logging
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import ROOT, read_metrics

from mhr_scale.config import FinetuneRunConfig, PretrainConfig, RunConfig
from mhr_scale.errors import ConfigError
from mhr_scale.recipe.reading import load
from mhr_scale.run import tracking
from mhr_scale.run.runlog import Metrics
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


def recipe(folder: Path, *overrides: str) -> PretrainConfig:
    words = [*SHORT, f"run.folder={folder}", *overrides]
    return load(PretrainConfig, ROOT / "launch" / "recipes" / "toy.yaml", words)


def tensorboard_steps(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    names = shown.Tags()["scalars"]
    return {name: [(one.step, one.value) for one in shown.Scalars(name)] for name in names}


def wandb_records(file: Path) -> list[Any]:
    """The records of an offline run: blocks of 32 KiB, each record with checksum, length, type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is padding
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def wandb_history(file: Path) -> list[dict[str, str]]:
    rows = (record.history for record in wandb_records(file) if record.HasField("history"))
    return [
        {"/".join(item.nested_key) or item.key: item.value_json for item in row.item}
        for row in rows
    ]


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The numbers of metrics.jsonl by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(folder):
        for name, value in tracking.numbers_of(line).items():
            if name != "step":
                found.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-5)))
    return found


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
    assert {run.run_id for run in runs} == {tracking.wandb_id(resumed)}
    assert {run.display_name for run in runs} == {"toy"}


def test_without_trackers_nothing_of_theirs_is_imported() -> None:
    code = (
        "import sys, mhr_scale.training.opening, mhr_scale.verbs.finetune; "
        "from mhr_scale.run import tracking; tracking.check(()); "
        "context = tracking.opened((), None, resume_step=-1); assert context.__enter__() is None; "
        "assert not {'tensorboard', 'wandb'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- at the door -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
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


def test_a_tracker_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.trackers"):
        recipe(tmp_path, "run.trackers=[mlflow]")


@pytest.mark.parametrize("schema", [RunConfig, FinetuneRunConfig])
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

    def __init__(self, folder: Path, *, resume_step: int) -> None:
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
    monkeypatch.setitem(tracking.KINDS, "wandb", Failing)
    monkeypatch.setattr(Failing, "at", at)
    with (
        caplog.at_level(logging.WARNING, "mhr_scale"),
        tracking.opened(("wandb",), tmp_path, resume_step=-1) as track,
    ):
        metrics = Metrics(tmp_path / "metrics.jsonl", resume_step=-1, also=track)
        for step in range(3):
            metrics.write({"step": step, "loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    assert [record.message for record in caplog.records] == [
        "run.trackers: wandb failed and is left out, metrics.jsonl has everything: "
        f"{at}: the service is gone"
    ]


def test_a_run_that_fails_closes_its_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Failing] = []

    def make(folder: Path, *, resume_step: int) -> Failing:
        made.append(Failing(folder, resume_step=resume_step))
        return made[-1]

    monkeypatch.setitem(tracking.KINDS, "wandb", make)
    with (
        pytest.raises(RuntimeError, match="the run"),
        tracking.opened(("wandb",), tmp_path, resume_step=-1),
    ):
        raise RuntimeError("the run")
    assert made[0].calls == ["open", "close"]


# -- small parts -----------------------------------------------------------------------------------


def test_objects_inside_a_line_become_paths() -> None:
    line = {"step": 1, "a": {"b": 2.0, "c": {"d": 3}}, "name": "x", "none": None}
    assert tracking.numbers_of(line) == {"step": 1, "a/b": 2.0, "a/c/d": 3}


def test_the_id_of_a_run_folder_moves_with_it(tmp_path: Path) -> None:
    first = tracking.wandb_id(tmp_path / "one")
    assert first == tracking.wandb_id(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert first == tracking.wandb_id(tmp_path / "two")
    assert first != tracking.wandb_id(tmp_path / "three")
