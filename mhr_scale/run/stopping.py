"""Graceful stopping: signals, a launcher that has died, and the deadline after them.

SIGTERM, SIGINT (Ctrl-C), SIGHUP (a lost connection) and SIGUSR1 (which Slurm can send ahead of its
time limit) ask a run to save and exit; under `nohup` SIGHUP stays ignored. Inside `held` a request
is deferred to the end of the step: loops poll `is_asked` and raise `Stopped` once their state is
saved. Elsewhere there is nothing to save, and the signal handler raises `Stopped` at once. A thread
handles what cannot wait: it receives signals even while the main thread is stuck in a collective,
asks when the launcher has died (a killed `deepspeed` leaves its ranks behind), and ends the process
`DEADLINE_SECONDS` after any signal but SIGUSR1, before launchers send SIGKILL.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from mhr_scale.errors import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
#: The deepspeed launcher, torchrun and Slurm kill after 30 s.
DEADLINE_SECONDS = 28.0
#: A SIGINT this long after the first one counts as a second Ctrl-C.
AGAIN_SECONDS = 0.5


class Stopped(BaseException):
    """The run was asked to stop, and did. Like KeyboardInterrupt, not an error to be handled."""


class _Request:
    """Whether this process was asked to stop, why, and how many `held` blocks defer it."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.reason = ""
        self.holders = 0


_request = _Request()


def ask(reason: str) -> None:
    """Ask this process to stop; the first reason counts."""
    _request.reason = _request.reason or reason
    _request.asked.set()


def is_asked() -> bool:
    """Whether this process was asked to stop (others may not have been: reduce it over ranks)."""
    return _request.asked.is_set()


def reason() -> str:
    """Who asked: the name of a signal, or the launcher; empty if only another rank was asked."""
    return _request.reason


def forget() -> None:
    """Withdraw the request to stop."""
    _request.asked.clear()
    _request.reason = ""


def stop(what: str) -> Stopped:
    """The exception to raise; `what` says what is saved."""
    return Stopped(f"stopped by {reason() or 'another rank'}: {what}; the same command goes on")


@contextmanager
def held() -> Iterator[None]:
    """Inside the block a request to stop is deferred until the block polls it."""
    _request.holders += 1
    try:
        yield
    finally:
        _request.holders -= 1


def wait_asked(seconds: float) -> bool:
    """Wait this long to be asked to stop; returns whether it happened."""
    return _request.asked.wait(seconds)


def wait_for(work: Any, what: str) -> None:
    """Wait for an asynchronous collective, and no longer than until this process is asked to stop.

    For waits that may take hours, with nothing to save on this rank; `what` goes into `Stopped`.
    """
    while not work.is_completed():
        if is_asked():
            raise stop(what)
        time.sleep(0.05)
    work.wait()


@contextmanager
def listening() -> Iterator[None]:
    """Take signals as requests to stop inside the block, and watch the launcher.

    Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    forget()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS if _is_heard(number)}
    old_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = _Watcher(reader)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()  # ends the watcher
        watcher.join(timeout=2.0)  # or it would ask again later


def _is_heard(number: signal.Signals) -> bool:
    """Whether a signal asks this process to stop: not SIGHUP under `nohup`."""
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN


def ignore_signals(*_: object) -> None:
    """Leave signals to the parent process: for worker processes, which end with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)


def _on_signal(number: int, frame: object) -> None:
    """The signal handler: runs in the main thread, as soon as that executes Python again."""
    ask(signal.Signals(number).name)
    if not _request.holders:
        raise stop("nothing was to be saved")


class _Watcher(threading.Thread):
    """Receives signals beside the main thread, and watches launchers and the deadline."""

    def __init__(self, reader: socket.socket) -> None:
        super().__init__(name="mhr_scale-stopping", daemon=True)
        self._reader = reader
        self._launchers = find_launchers()
        self._interrupted = 0.0
        self._deadline = float("inf")

    def run(self) -> None:
        with self._reader:
            while True:
                ready, _, _ = select.select([self._reader], [], [], 1.0)
                numbers = self._reader.recv(64) if ready else b""
                if ready and not numbers:
                    return
                for number in numbers:
                    self._take(number)
                self._look_at_launchers()
                if time.monotonic() > self._deadline:
                    self._leave(f"no end of a step within {DEADLINE_SECONDS:g} s")

    def _take(self, number: int) -> None:
        if number not in SIGNALS:
            return
        ask(signal.Signals(number).name)
        now = time.monotonic()
        if number != signal.SIGUSR1:
            self._deadline = min(self._deadline, now + DEADLINE_SECONDS)
        if number == signal.SIGINT:
            if self._interrupted and now - self._interrupted > AGAIN_SECONDS:
                self._leave("interrupted twice")
            self._interrupted = self._interrupted or now

    def _look_at_launchers(self) -> None:
        if any(is_gone(launcher) for launcher in self._launchers):
            self._launchers = []
            ask("the launcher, which is gone")
            os.kill(os.getpid(), signal.SIGTERM)

    def _leave(self, why: str) -> None:
        """End the process at once; saves are atomic, so the last one stays valid."""
        with suppress(OSError, ValueError):
            sys.stderr.write(
                f"stopped by {reason()}, {why}: left without saving; the same command goes on from "
                "the last save\n"
            )
            sys.stderr.flush()
        os._exit(ExitCode.AGAIN)


def find_launchers() -> list[psutil.Process]:
    """The processes without which this one is of no use: the launcher, and the launcher's launcher.

    The `deepspeed` command starts a second process that starts the ranks; ended by a signal, it
    leaves both behind.
    """
    launchers: list[psutil.Process] = []
    process = psutil.Process()
    with suppress(psutil.Error):
        while "WORLD_SIZE" in os.environ and len(launchers) < 2:
            process = process.parent()
            if process is None or not _is_launcher(process.cmdline()):
                break
            launchers.append(process)
    return launchers


def _is_launcher(words: list[str]) -> bool:
    modules = ("deepspeed.launcher.", "torch.distributed.")
    names = ("deepspeed", "torchrun")
    return any(word.startswith(modules) or os.path.basename(word) in names for word in words[:5])


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, reaped by its parent or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
