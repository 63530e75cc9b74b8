"""Being asked to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from mhr_scale.run import stopping


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    stopping.forget()
    yield
    stopping.forget()


def wait_until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("number", stopping.SIGNALS, ids=lambda number: number.name)
def test_a_signal_waits_for_the_end_of_a_step(number: signal.Signals) -> None:
    with stopping.listening(), stopping.held():
        assert not stopping.is_asked()
        os.kill(os.getpid(), number)
        wait_until(stopping.is_asked)
    assert stopping.reason() == number.name


def test_a_signal_outside_a_loop_ends_what_is_running() -> None:
    def ask_and_go_on() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with stopping.listening(), pytest.raises(stopping.Stopped, match="stopped by SIGTERM"):
        ask_and_go_on()


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.listening():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_under_nohup_a_lost_connection_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_reason_counts() -> None:
    stopping.ask("SIGUSR1")
    stopping.ask("SIGTERM")
    assert "stopped by SIGUSR1: step 3 is saved" in str(stopping.stop("step 3 is saved"))


def test_a_rank_that_was_not_asked_itself_says_so() -> None:
    assert "stopped by another rank" in str(stopping.stop("step 3 is saved"))


class Work:
    """An asynchronous collective that is over after some looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        assert self.looks < 0


def test_a_long_wait_ends_with_its_work_or_when_asked() -> None:
    stopping.wait_for(Work(3), "nothing")
    stopping.ask("SIGTERM")
    with pytest.raises(stopping.Stopped, match="all jobs are done"):
        stopping.wait_for(Work(10**9), "all jobs are done")


PROGRAMME = """
import os, signal, sys, time
from mhr_scale.run import stopping
stopping.DEADLINE_SECONDS, stopping.AGAIN_SECONDS = 0.5, 0.05
with stopping.listening(), stopping.held():
    {body}
"""
BODIES = {
    "a deadline that passes": "os.kill(os.getpid(), signal.SIGTERM)",
    "an interruption, twice": (
        "stopping.DEADLINE_SECONDS = 60; os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2); "
        "os.kill(os.getpid(), signal.SIGINT)"
    ),
    "a launcher that is gone": (
        "import subprocess, psutil; p = subprocess.Popen(['true']); time.sleep(0.2); "
        "next(t for t in __import__('threading').enumerate() if 'stopping' in t.name)._launchers "
        "= [psutil.Process(p.pid)]"
    ),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_process_that_does_not_get_to_the_end_of_a_step_is_ended(body: str) -> None:
    code = PROGRAMME.format(body=f"{body}; time.sleep(60)")
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 75, ended.stderr
    assert "left without saving; the same command goes on from the last save" in ended.stderr


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (["python", "/usr/bin/deepspeed", "--num_gpus", "2"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="], True),
        (["python", "/usr/bin/torchrun", "--nproc-per-node", "2"], True),
        (["python", "-m", "torch.distributed.run"], True),
        (["-bash"], False),
        (["python", "-m", "pytest", "tests", "-k", "deepspeed"], False),
        (["slurmstepd: [12.0]"], False),
    ],
)
def test_launchers_are_known_by_their_command(words: list[str], is_one: bool) -> None:
    assert stopping._is_launcher(words) is is_one


def test_without_a_launcher_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert stopping.find_launchers() == []


def test_a_process_is_gone_before_anybody_reaps_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    assert not stopping.is_gone(process)
    child.kill()
    wait_until(lambda: stopping.is_gone(process))
    child.communicate()
    assert stopping.is_gone(process)
