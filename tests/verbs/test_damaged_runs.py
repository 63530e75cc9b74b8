"""Damaged saves, full disks and what others may have written: one line, and no save is lost."""

import errno
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import TOY
from stopped_runs import SETTINGS, check_same, lora, recipe, stopped

from mhr_scale.config import PretrainConfig
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.jobs.job_data import JobData
from mhr_scale.run import folders
from mhr_scale.training import saved_steps
from mhr_scale.training.trainer import Trainer
from mhr_scale.verbs.finetune import finetune
from mhr_scale.verbs.launching import main
from mhr_scale.verbs.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("on_cpu")


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
    with pytest.raises(RunError, match=r"000005/adapter\.json: .*000004/adapter\.json: "):
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
    assert saved_steps.complete_steps(tmp_path) == kept


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
        pytest.raises(RunError, match=r"/steps/000004: .*ulimit -f.*; step 3 "),
    ):
        pretrain(recipe(tmp_path))
    assert saved_steps.complete_steps(tmp_path) == [3]
    assert saved_steps.find_whole(tmp_path) == 3
    assert not any(tmp_path.rglob("*.tmp"))
    pretrain(recipe(tmp_path))
    check_same(tmp_path, whole)


def test_a_full_disk_under_fine_tuning_is_one_line(exported: Path, tmp_path: Path) -> None:
    config = lora(exported, tmp_path)
    with (
        small_files(20_000),
        pytest.raises(RunError, match=r"/steps/000004: .*nothing is saved"),
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

    monkeypatch.setattr(folders, "flush", flush)
    with pytest.raises(RunError, match=f"/steps/000004: .*adapter.json: {words}"):
        pretrain(recipe(tmp_path))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "error: memory"),
        (FileNotFoundError(2, "gone", "rows.arrow"), "error: rows.arrow: "),
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
        main(PretrainConfig, pretrain, about="pretrain RECIPE")
    assert left.value.code == 2
    assert words in capsys.readouterr().err
    assert saved_steps.find_whole(tmp_path) == 4


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
    with pytest.raises(RunError, match="/steps/000003: "):
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
    assert str(caught.value).startswith(f"{file}: 1 ")
    linear = spoilt.removeprefix("base_model.model.").split(".lora_")[0]
    assert f" {linear}." in str(caught.value)
