"""Ranks that end, fail or fall silent beside ranks whose main thread waits and cannot tell."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist
from processes import ROOT, free_port

from mhr_scale.engine import heartbeat
from mhr_scale.engine.heartbeat import DeviceWatch, Heartbeat
from mhr_scale.errors import ExitCode
from mhr_scale.run.writer import Writer

N_RANKS = 3
LONG = timedelta(seconds=60)


@pytest.fixture
def ends(monkeypatch):
    """What ranks ended with, by rank, who would else end the process."""
    found = {}
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(
        Heartbeat, "_end", lambda self, explained: found.update({self._rank: explained})
    )
    return found


def make(timeout=LONG, **of_ranks):
    store = dist.HashStore()

    def make_one(rank):
        options = {"rank": rank, "world_size": N_RANKS, "timeout": timeout}
        return Heartbeat(store, **options, **of_ranks.get(f"rank{rank}", {}))

    with ThreadPoolExecutor(N_RANKS) as pool:
        return list(pool.map(make_one, range(N_RANKS)))


def finish(ranks):
    for rank in ranks:
        rank._thread.join(10.0)
        assert not rank._thread.is_alive()


def test_once_a_rank_has_left_well_the_others_may_take_their_time(ends):
    ranks = make()
    ranks[1].leave(is_failing=False)
    finish(ranks)
    for rank in (ranks[0], ranks[2]):
        rank.leave(is_failing=True)
    assert ends == {}


def test_a_rank_that_leaves_with_an_error_ends_those_that_do_not_find_out(ends):
    ranks = make()
    ranks[1].leave(is_failing=True)
    finish(ranks)
    assert {rank: end.code for rank, end in ends.items()} == dict.fromkeys(
        (0, 2), ExitCode.ANOTHER_RANK
    )
    assert "another rank has ended" in ends[0].text


def test_a_rank_whose_main_thread_finds_out_by_itself_is_left_to_it(ends, monkeypatch):
    monkeypatch.setattr(heartbeat, "PATIENCE_SECONDS", 10.0)
    ranks = make()
    for rank in (1, 0, 2):
        ranks[rank].leave(is_failing=True)
    finish(ranks)
    assert ends == {}


def test_a_save_in_flight_is_waited_for(ends):
    ranks, written = make(), threading.Event()
    writer = Writer()
    writer.submit(lambda: written.wait(10.0))
    ranks[1].leave(is_failing=True)
    ranks[0]._thread.join(1.0)  # twenty times its patience
    assert ranks[0]._thread.is_alive()
    assert ends == {}
    written.set()
    writer.wait()
    finish(ranks)
    assert ends.keys() == {0, 2}


def test_a_device_that_gets_nowhere_ends_its_rank_and_then_the_others(ends):
    ranks = make(rank2={"is_stuck": lambda: True})
    ranks[2]._thread.join(10.0)
    assert ends[2].code == ExitCode.MISTAKE
    assert "waited in vain" in ends[2].text
    for rank in ranks[:2]:
        rank.leave(is_failing=False)  # alone: the other one, whose process would end, is silent


def test_a_silent_rank_ends_the_others_after_the_timeout(ends, monkeypatch):
    monkeypatch.setattr(Heartbeat, "_watch", _watch_unless_first(Heartbeat._watch))
    ranks = make(timedelta(seconds=0.3))
    finish(ranks)
    assert {rank: end.code for rank, end in ends.items()} == dict.fromkeys((1, 2), ExitCode.MISTAKE)


def _watch_unless_first(watch):
    return lambda self: watch(self) if self._rank else time.sleep(1.0)


class Mark:
    """A mark that a device passes when told so."""

    passed = False

    def query(self):
        return self.passed


def test_a_device_is_stuck_if_it_passes_no_mark_for_as_long_as_the_timeout(monkeypatch):
    now, marks = [100.0], []
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])

    def put_mark():
        marks.append(Mark())
        return marks[-1]

    is_stuck = DeviceWatch(timedelta(seconds=5), put_mark)
    for seconds, is_passed, expected in (
        (0, False, False),
        (4, False, False),  # a long kernel
        (2, True, False),
        (4, False, False),
        (2, False, True),
    ):
        now[0] += seconds
        if marks:
            marks[-1].passed = is_passed
        assert is_stuck() is expected
    assert len(marks) == 2


#: A rank whose main thread is stuck beside one that is stopped, as by a debugger or a dead machine.
PROGRAMME = """
import os, signal, sys, time
from datetime import timedelta
from mhr_scale.engine import engine as engines, heartbeat
from mhr_scale.verbs.launching import guarded
heartbeat.PATIENCE_SECONDS = 0.5
def beat(store, **options):
    options["timeout"] = timedelta(seconds=float(sys.argv[1]))
    return heartbeat.Heartbeat(store, **options)
engines.Heartbeat = beat
def action():
    with engines.Engine({}, timeout_seconds=600) as engine:
        engine.gather_barrier()
        if engine.rank == 1:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        time.sleep(600)
guarded(action)
"""


def start_pair(how, timeout):
    """Two ranks, of which the second one sends itself a signal."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", PROGRAMME, str(timeout), how]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "DS_ACCELERATOR": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


@pytest.mark.dist
@pytest.mark.slow
def test_a_process_that_is_stopped_or_killed_ends_the_other_with_its_code():
    expected = {
        "SIGSTOP": (8.0, 2, "rank 0: error: waited in vain for the other ranks"),
        "SIGKILL": (600.0, 69, "rank 0: ends because another rank has ended"),
    }
    pairs = {how: start_pair(how, timeout) for how, (timeout, _, _) in expected.items()}
    try:
        for how, (_, code, words) in expected.items():
            _, printed = pairs[how][0].communicate(timeout=90.0)
            assert pairs[how][0].returncode == code, printed
            assert words in printed
        assert psutil.Process(pairs["SIGSTOP"][1].pid).status() == psutil.STATUS_STOPPED
    finally:
        for process in (rank for ranks in pairs.values() for rank in ranks):
            process.send_signal(signal.SIGKILL)
            process.communicate()
