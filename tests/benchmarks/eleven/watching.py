"""What a command takes: time, own memory of its processes, bytes read from the disk."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
LOOK_SECONDS = 0.1
#: What the log says once a backbone is placed and checked.
OPENED = "backbone: its stored logits"


@dataclass
class Watched:
    """One command: wall seconds, peaks in bytes, bytes read, and its output."""

    returncode: int = 0
    seconds: float = 0.0
    opened_after: float | None = None
    """Seconds until the backbone was placed and its logits compared."""
    own_bytes: int = 0
    """Memory of its own (anonymous) of the process that took most, at its peak."""
    all_own_bytes: int = 0
    """The same, of all processes together."""
    read_bytes: int = 0
    """Bytes that came from the disk, not from the file cache."""
    lines: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Everything but the output, rounded for a table."""
        opened = None if self.opened_after is None else round(self.opened_after, 1)
        return {
            "seconds": round(self.seconds, 1),
            "opened after seconds": opened,
            "own GiB, one process": round(self.own_bytes / 2**30, 2),
            "own GiB, all processes": round(self.all_own_bytes / 2**30, 2),
            "read GB": round(self.read_bytes / 1e9, 1),
        }


def run(
    command: Sequence[str], *, stop_when: Callable[[], bool] | None = None, **environment: str
) -> Watched:
    """Run a command from the checkout; once `stop_when` holds, kill all its processes at once."""
    watched, begun = Watched(), time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    reader = threading.Thread(target=_read, args=(process, watched, begun))
    reader.start()
    read: dict[int, int] = {}
    while process.poll() is None:
        _look(process.pid, watched, read)
        if stop_when is not None and stop_when():
            _kill_all(process.pid)
        time.sleep(LOOK_SECONDS)
    reader.join()
    watched.returncode, watched.seconds = process.returncode, time.monotonic() - begun
    watched.read_bytes = sum(read.values())
    if watched.returncode and stop_when is None:
        raise SystemExit(f"{' '.join(command)}\n" + "\n".join(watched.lines[-20:]))
    return watched


def _read(process: subprocess.Popen[str], watched: Watched, begun: float) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        watched.lines.append(line.rstrip())
        print(f"    {line.rstrip()}", file=sys.stderr)
        if OPENED in line and watched.opened_after is None:
            watched.opened_after = time.monotonic() - begun


def _look(pid: int, watched: Watched, read: dict[int, int]) -> None:
    own = []
    for number in _family(pid):
        with suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{number}/status").read_text()
            own.append(1024 * int(status.split("RssAnon:")[1].split()[0]))
            counts = Path(f"/proc/{number}/io").read_text()
            read[number] = int(counts.split("read_bytes:")[1].split()[0])
    watched.own_bytes = max([watched.own_bytes, *own])
    watched.all_own_bytes = max(watched.all_own_bytes, sum(own))


def _family(pid: int) -> list[int]:
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return []


def _kill_all(pid: int) -> None:
    for number in reversed(_family(pid)):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
