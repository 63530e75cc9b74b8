"""Ranks that fail, hang or are killed, through the launchers: the job ends, the last save is whole,
nobody is left behind, and the same command goes on to what an undisturbed run leaves."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from processes import finish, free_port, read_metrics, run, start, succeed

from mhr_scale.training import saved_steps

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PROGRAMME = "tests/distributed/programs/pretrain_failing.py"
SETTINGS = (
    "launch/recipes/toy.yaml",
    "adapter.policy=noisy",
    "schedule.steps=6",
    "schedule.warmup_fraction=0.2",
    "run.save_every=2",
    "run.log_every=1",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "tasks.n_tasks=6",
    "tasks.train_examples=20",
)
#: From the failure on; starting takes about ten seconds more.
LIMIT_SECONDS = 90.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("failures") / "whole"
    succeed("launch/pretrain.py", *SETTINGS, f"run.folder={folder}")
    return folder


def check_same(folder: Path, whole: Path) -> None:
    for name in ("adapter/adapter.safetensors", "steps/000006/resume/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    keys = ("step", "loss", "validation_loss")
    mine, theirs = (
        [[line.get(key) for key in keys] for line in read_metrics(f)] for f in (folder, whole)
    )
    assert mine == theirs


def check_nobody_is_left(folder: Path) -> None:
    pids = [int(file.read_text()) for file in folder.glob("*.pid")]
    assert len(pids) == 2
    for _ in range(300):
        alive = [pid for pid in pids if psutil.pid_exists(pid)]
        if all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in alive):
            return
        time.sleep(0.1)
    raise AssertionError(f"processes {alive} are left")


def failed(how: str, folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, of which rank 1 fails before step 4; nobody and no half save is left."""
    arguments = (how, "3", str(folder), *SETTINGS, f"run.folder={folder / 'run'}", *settings)
    result = run(PROGRAMME, *arguments, ranks=2, timeout=LIMIT_SECONDS)
    check_nobody_is_left(folder)
    assert saved_steps.find_whole(folder / "run") == 2
    assert not any((folder / "run").rglob("*.tmp"))
    return result


def test_a_rank_that_raises_ends_the_job_with_its_traceback_and_code(tmp_path: Path) -> None:
    result = failed("raise", tmp_path)
    assert result.returncode == 1
    assert "rank 1: Traceback" in result.stdout
    assert "LookupError: this rank has had enough" in result.stdout
    assert "rank 0: ends because another rank has ended" in result.stdout
    assert "rank 0: Traceback" not in result.stdout


def test_a_rank_that_is_killed_ends_the_job_with_its_code(tmp_path: Path) -> None:
    result = failed("kill", tmp_path)
    assert result.returncode == 256 - signal.SIGKILL
    assert "Traceback" not in result.stdout


def test_a_mistake_on_one_rank_is_said_by_it_and_its_code_wins(tmp_path: Path) -> None:
    result = failed("mistake", tmp_path)
    assert result.returncode == 2
    assert "rank 1: error: train.jsonl:7: gone bad; mend it" in result.stdout


def test_a_stuck_rank_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    result = failed("hang", tmp_path, "run.timeout_seconds=5")
    assert result.returncode == 2
    assert "error: waited in vain for the other ranks, as long as run.timeout" in result.stdout
    assert "stopped by SIGTERM, no end of a step within" in result.stdout


def test_ranks_whose_launcher_is_ended_save_and_go_on_on_another_number(
    tmp_path: Path, whole: Path
) -> None:
    """The `deepspeed` command dies of SIGTERM and leaves all its processes behind."""
    folder = tmp_path / "run"
    settings = (*SETTINGS, f"run.folder={folder}", "run.save_every=0")
    process = start(PROGRAMME, "slow", "0", str(tmp_path), *settings, ranks=2)
    while process.poll() is None and not (tmp_path / "step.1").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    printed = finish(process, timeout=30.0).stdout
    assert process.returncode == -signal.SIGTERM
    check_nobody_is_left(tmp_path)
    (step,) = saved_steps.complete_steps(folder)
    assert 0 < step < 6
    gone = "the launcher, which is gone|another rank"  # the one that noticed first
    assert re.search(f"stopped by ({gone}): step {step} is saved", printed)
    succeed("launch/pretrain.py", *SETTINGS, f"run.folder={folder}")
    check_same(folder, whole)


def test_a_supervised_job_starts_again_by_itself(tmp_path: Path, whole: Path) -> None:
    launcher = ("torchrun", "--nproc-per-node", "2", "--max-restarts", "1")
    arguments = ("kill_once", "3", str(tmp_path), *SETTINGS, f"run.folder={tmp_path / 'run'}")
    port = ("--master-port", str(free_port()))
    result = run(PROGRAMME, *arguments, launcher=(*launcher, *port), timeout=LIMIT_SECONDS)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "exitcode: -9" in result.stdout
    assert "resumed from" in result.stdout
    check_same(tmp_path / "run", whole)
