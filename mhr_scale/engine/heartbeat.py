"""A heartbeat beside the ranks' collectives: the end of one, or its silence, ends the others.

On a CPU a collective raises where another rank has ended. On a GPU nothing does: the host waits for
a kernel that waits for a rank that is gone, until NCCL's watchdog aborts the process, with a code
and a page of its own. So a thread of each rank meets the others once a second over sockets of its
own, and looks whether the device gets anywhere; what a main thread does not find out by itself
within some seconds, it says, and ends the process with the code that a CPU's run ends with.

The part that looks at a device has not run on a GPU. By torch's sources, NCCL's watchdog waits for
a minute between noticing a failure and aborting (`TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC`, four
times), which is later than this.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from mhr_scale.errors import ExitCode
from mhr_scale.run import failures
from mhr_scale.run.failures import Explained
from mhr_scale.run.runlog import log
from mhr_scale.run.writer import is_writing

BEAT_SECONDS = 1.0
#: How long the main thread may take to find out by itself: as long as a rank without an error of
#: its own waits for the one that has one to say it, and shorter than NCCL's watchdog waits.
PATIENCE_SECONDS = 20.0


class State(IntEnum):
    """What a rank tells the others; the least of them all counts."""

    FAILING = 0
    LEAVING = 1
    HERE = 2


class Heartbeat:
    """The thread of one rank. Made and left by all ranks; once one has left well, none watches."""

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        timeout: timedelta,
        is_stuck: Callable[[], bool] = lambda: False,
    ) -> None:
        """Meet the other ranks and begin. Collective.

        A rank that is silent for the `timeout` counts as stuck, and so does this one's device
        while it `is_stuck`.
        """
        self._rank, self._is_stuck = rank, is_stuck
        self._group: Any = dist.ProcessGroupGloo(
            dist.PrefixStore("mhr_scale/heartbeat", store), rank, world_size, timeout
        )
        self._state, self._has_left = State.HERE, threading.Event()
        self._thread = threading.Thread(target=self._run, name="mhr_scale-heartbeat", daemon=True)
        self._thread.start()

    def leave(self, *, is_failing: bool) -> None:
        """Tell the others that this rank leaves, and why."""
        self._state = State.FAILING if is_failing else State.LEAVING
        self._has_left.set()
        self._thread.join(2.0 * BEAT_SECONDS)

    def _run(self) -> None:
        explained = self._watch()
        if explained is None:
            return
        is_leaving = self._has_left.wait(PATIENCE_SECONDS)
        while not is_leaving and is_writing():  # a slow disk is no reason to lose a save
            is_leaving = self._has_left.wait(BEAT_SECONDS)
        if not is_leaving:
            self._end(explained)

    def _watch(self) -> Explained | None:
        """Beat until a rank leaves; returns what to end with, if anything."""
        while True:
            self._has_left.wait(BEAT_SECONDS)
            own = self._state
            least = torch.tensor([int(own)])
            options: Any = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MIN
            try:
                self._group.allreduce([least], options).wait()
            except RuntimeError as error:
                return None if own != State.HERE else failures.explain(error) or failures.LOST_RANK
            if own != State.HERE or least.item() == State.LEAVING:
                return None
            if least.item() == State.FAILING:
                return failures.LOST_RANK
            with suppress(RuntimeError):  # of a device that fails the main thread is told, too
                if self._is_stuck():
                    return failures.STUCK_RANK

    def _end(self, explained: Explained) -> None:
        """End the process at once; saves are atomic, so the last one stays valid."""
        mistake = "error: " if explained.code == ExitCode.MISTAKE else ""
        log.error("rank %d: %s%s", self._rank, mistake, explained.text)
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(explained.code)


class DeviceWatch:
    """Whether a GPU has done nothing of what it was given for as long as the timeout.

    A mark is put behind all that is in its queue; there it stays while a collective in front of it
    waits for another rank. Costs the step nothing: the mark is put, and asked for, by the thread
    that watches.
    """

    def __init__(self, timeout: timedelta, put_mark: Callable[[], Any]) -> None:
        """`put_mark` gives a mark whose `query` says whether the device has passed it."""
        self._seconds, self._put_mark = timeout.total_seconds(), put_mark
        self._mark: Any = None
        self._since = 0.0

    def __call__(self) -> bool:
        """Whether the last mark has been in its place for longer than the timeout."""
        if self._mark is None or self._mark.query():
            self._mark, self._since = self._put_mark(), time.monotonic()
        return time.monotonic() - self._since > self._seconds


def watch_of(device: torch.device, timeout: timedelta) -> Callable[[], bool]:
    """What tells whether a device is stuck; a CPU's collectives raise by themselves."""
    if device.type != "cuda":
        return lambda: False

    def put_mark() -> Any:
        return torch.cuda.default_stream(device).record_event()

    return DeviceWatch(timeout, put_mark)
