"""Starting a launch script and killing it: when, whom, how, and who is left.

Every process of a launch carries a mark in its environment, so that those that outlive it are found
whoever their parent is by then.
"""

import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from processes import start

MARK = "MHR_KILLED_LAUNCH"
#: From a kill, or from the start of a launch that nobody kills, until everyone has left.
LIMIT_SECONDS = 150.0
#: Whom a kill hits under a launcher.
WHO = ("a rank", "the launcher", "all")
SIGTERM_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill: after so many seconds, at a number of lines, or in the next save after them."""

    seconds: float = 0.0
    lines: int = 0
    in_save: bool = False

    def __str__(self) -> str:
        when = f"line {self.lines}" if self.lines else f"{self.seconds:.1f} s"
        return f"in a save after {when}" if self.in_save else f"at {when}"


@dataclass(slots=True)
class Launch:
    """One start of a script, and how it ended; `kill` says what was done to it."""

    ranks: int
    code: int
    output: str
    seconds: float
    kill: str = ""
    faults: list[str] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether the script came to its end."""
        return self.code == 0


def launch(
    script: str,
    arguments: tuple[str, ...],
    folder: Path,
    *,
    ranks: int,
    count_lines: Callable[[], int],
    moment: Moment | None = None,
    draw: random.Random | None = None,
) -> Launch:
    """Run a script on a folder, and kill it at a moment, if one is given; waits until all are gone.

    Without a kill it has to end well. A `Launch` has faults where that, or the end, is not as it
    should be: other exit codes, tracebacks, processes that stay.
    """
    begun = time.monotonic()
    with marked() as mark:
        process = start(script, *arguments, ranks=0 if ranks == 1 else ranks)
    kill = ""
    if moment is not None and draw is not None:
        wait_for(moment, process, folder, count_lines)
        if process.poll() is None:
            kill = f"{strike(process, mark, ranks, draw)} {moment}"
    done = Launch(ranks, 0, "", 0.0, kill)
    try:
        done.output = process.communicate(timeout=LIMIT_SECONDS)[0]
    except subprocess.TimeoutExpired:
        done.faults.append(f"not everyone has left after {LIMIT_SECONDS:g} s")
    left = wait_until_gone(mark)
    done.faults += [f"process {name} is left" for name in left]
    if done.output == "":
        done.output = process.communicate()[0]
    done.code, done.seconds = process.wait(), time.monotonic() - begun
    if not kill and done.code:
        done.faults.append(f"exit code {done.code}: {done.output[-3000:]}")
    if "Traceback" in done.output:
        done.faults.append(f"a traceback: {done.output[-3000:]}")
    return done


@contextmanager
def marked() -> Iterator[str]:
    """Processes started inside the block carry the mark."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    try:
        yield mark
    finally:
        del os.environ[MARK]


def find_marked(mark: str) -> list[psutil.Process]:
    """The live processes that carry a mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until_gone(mark: str, seconds: float = 5.0) -> list[str]:
    """Kill what carries a mark and is still there after so long; the names of these."""
    end = time.monotonic() + seconds
    while (left := find_marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    names = []
    for process in left:
        with suppress(psutil.Error):
            names.append(f"{process.pid} ({' '.join(process.cmdline()[:4])})")
            process.kill()
    return names


def wait_for(
    moment: Moment, process: subprocess.Popen[str], folder: Path, count_lines: Callable[[], int]
) -> None:
    """Wait for a moment, and no longer than the process lives."""
    begun = time.monotonic()
    while process.poll() is None:
        is_due = time.monotonic() - begun >= moment.seconds and count_lines() >= moment.lines
        if is_due and not (moment.in_save and not is_saving(folder)):
            return
        time.sleep(0.005)


def is_saving(folder: Path) -> bool:
    """Whether a folder of a save is being filled at this moment."""
    with suppress(OSError):
        return any(folder.glob("**/steps/.*.tmp"))
    return False


def strike(process: subprocess.Popen[str], mark: str, ranks: int, draw: random.Random) -> str:
    """Send SIGKILL, or now and then SIGTERM, to a rank, the launcher or all; what was done."""
    number = signal.SIGTERM if draw.random() < SIGTERM_SHARE else signal.SIGKILL
    who = "the process" if ranks == 1 else draw.choice(WHO)
    everyone = find_marked(mark)
    victims = everyone if who == "all" else [one for one in everyone if one.pid == process.pid]
    if who == "a rank":
        victims = [one for one in everyone if is_rank(one)]
        victims = [draw.choice(victims)] if victims else everyone
    for victim in victims:
        with suppress(psutil.Error):
            victim.send_signal(number)
    return f"{number.name} to {who} of {ranks}"


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is one that a launcher has started to work."""
    with suppress(psutil.Error, OSError):
        return "RANK" in process.environ()
    return False
