"""The run folder's record: log lines, metrics.jsonl, provenance.json, the progress bar.

Rank 0 writes; the other ranks stay silent unless something is wrong.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mhr_scale.errors import RunError, printable
from mhr_scale.run.files import append_text, as_size, flush, read_json, write_json, write_text
from mhr_scale.run.streams import LogHandler

log = logging.getLogger("mhr_scale")

PACKAGES = (
    "mhr_scale",
    "torch",
    "deepspeed",
    "transformers",
    "safetensors",
    "numpy",
    "peft",
    "bitsandbytes",
)

#: The commit of code that lies outside git, or where git is not installed.
UNKNOWN = "unknown"

#: Steps that the progress line tells the mean of, and of which of their numbers.
RECENT_STEPS = 50
RECENT = ("loss", "tokens", "seconds")


def rank() -> int:
    """Rank of this process, from the launcher's environment (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of this launch (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_here() -> int:
    """Number of this launch's processes on this machine, as deepspeed or torchrun sets it."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return world_size()


def start_logging() -> None:
    """Send the package's log lines to standard error: all of rank 0's, others' errors only."""
    handler = LogHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)


def metric_lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """The lines of a `metrics.jsonl`: number, text and values (None: a torn line).

    Raises `RunError` if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); move it away") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = json.loads(line)
            yield number, line, {**values, "step": int(values["step"])}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            yield number, line, None


def read_metric(path: Path, name: str) -> list[Any]:
    """The values of one name in a `metrics.jsonl`, in the order of the steps."""
    lines = (values for _, _, values in metric_lines(path))
    return [values[name] for values in lines if values is not None and name in values]


class Metrics:
    """`metrics.jsonl`: one JSON object per logged step, in the order of the steps.

    A resumed run first drops the lines after the step it resumes from, and does not repeat one of
    that step, so that nothing is missing or there twice. `also` is called with every line that is
    written (a tracker).
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int,
        also: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.path = path
        self._also = also
        self._known: set[str] = set()
        if path.exists():
            kept = []
            for number, line, values in metric_lines(path):
                if values is None:
                    log.warning("%s:%d: torn line dropped", path, number)
                elif values["step"] <= resume_step:
                    kept.append(line + "\n")
                    if values["step"] == resume_step:
                        self._known.add(line + "\n")
            write_text(path, "".join(kept))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        line = json.dumps(values) + "\n"
        if line in self._known:
            return
        append_text(self.path, line)
        if self._also is not None:
            self._also(values)

    def flush(self) -> None:
        """Flush the lines to disk, before a save from which a run may resume."""
        if self.path.exists():
            flush(self.path)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions of packages, `absent` for those that are not."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def provenance(**facts: Any) -> dict[str, Any]:
    """Where a run's numbers come from: command, code, versions, machine, and given facts."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "versions": versions_of(PACKAGES),
        **facts,
    }


def record_provenance(path: Path, **facts: Any) -> None:
    """Append this start to `provenance.json`, a list with one entry per start of the run."""
    starts: list[Any] = []
    if path.exists():
        starts = read_json(path, RunError, way_out="move it away")
        if not isinstance(starts, list):
            raise RunError(f"{path}: not a list of starts; move it away")
    write_json(path, [*starts, provenance(**facts)])


def _git_commit() -> str:
    """The commit this code runs from; `unknown` without git, or in somebody else's checkout."""
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return UNKNOWN
    return _git("describe", "--always", "--dirty", "--abbrev=40") or UNKNOWN


def _git(*words: str) -> str:
    """What git says of this file's folder; nothing if it is absent or refuses."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip()


def as_time(seconds: float) -> str:
    """Seconds as log lines tell how much time is left: `0:05:00`, `1 day, 2:03:04`."""
    return str(timedelta(seconds=round(seconds)))


class RecentSteps:
    """Means over the last steps, for the line of a progress bar: one step alone tells little."""

    def __init__(self) -> None:
        self._steps: deque[Mapping[str, float]] = deque(maxlen=RECENT_STEPS)

    def add(self, values: Mapping[str, float]) -> str:
        """Take a step's `loss`, and `tokens` and `seconds` if known; returns the means in words."""
        self._steps.append(values)
        count = len(self._steps)
        sums = {name: sum(step[name] for step in self._steps) for name in RECENT if name in values}
        text = f"loss {sums['loss'] / count:.4f}"
        if "seconds" in sums:
            text += f", {sums['tokens'] / sums['seconds']:,.0f} tokens/s"
        return f"{text} (mean of {count} steps)" if count > 1 else text


class Progress:
    """A progress bar on rank 0 of a terminal; elsewhere an occasional log line."""

    def __init__(
        self,
        total: int,
        *,
        start: int,
        what: str,
        unit: str = "step",
        every_seconds: float = 30.0,
        delay: float = 0.0,
    ) -> None:
        self._is_terminal = sys.stderr.isatty() and rank() == 0
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=what,
            unit=unit,
            unit_scale=unit == "B",
            disable=not self._is_terminal,
            delay=delay,
            dynamic_ncols=True,
        )
        self._what, self._total, self._done, self._first = what, total, start, start
        self._every, self._begun, self._last = every_seconds, time.monotonic(), time.monotonic()

    def advance(self, text: str, *, by: int = 1) -> None:
        """Advance by one step, or `by`; `text` describes the state (loss, tokens/s)."""
        self._done += by
        self._bar.update(by)
        self._bar.set_postfix_str(printable(text), refresh=False)
        now = time.monotonic()
        if not self._is_terminal and self._is_due(now):
            left = (now - self._begun) / (self._done - self._first) * (self._total - self._done)
            log.info("%s %s  %s  %s left", self._what, self._count(), text, as_time(left))
            self._last = now

    def _is_due(self, now: float) -> bool:
        return now - self._last > self._every or self._done == self._total

    def _count(self) -> str:
        return f"{self._done}/{self._total}"

    def skip(self, count: int) -> None:
        """Reduce the total by `count` steps."""
        self._total -= count
        self._bar.total = self._total

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class ByteProgress(Progress):
    """Progress counted in bytes: no log line before ten seconds, and no bar before one."""

    def __init__(self, total: int, *, what: str) -> None:
        super().__init__(total, start=0, what=what, unit="B", every_seconds=10.0, delay=1.0)

    def add(self, text: str, n_bytes: int) -> None:
        """Advance by `n_bytes`; `text` names the tensor or file."""
        self.advance(text, by=n_bytes)

    def _is_due(self, now: float) -> bool:
        is_long = now - self._begun > self._every
        return now - self._last > self._every or (is_long and self._done == self._total)

    def _count(self) -> str:
        return f"{as_size(self._done)} of {as_size(self._total)}"
