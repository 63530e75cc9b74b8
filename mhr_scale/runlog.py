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
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mhr_scale.errors import RunError

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


def rank() -> int:
    """Rank of this process, from the launcher's environment (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of this launch (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_logging() -> None:
    """Send the package's log lines to standard error: all of rank 0's, others' errors only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole: to a partial file, flushed to disk, then moved into place."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class Metrics:
    """`metrics.jsonl`: one JSON object per logged step, in the order of the steps.

    A resumed run first drops the lines after the step it resumes from, so that no step is missing
    and none stands twice.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        if path.exists():
            kept = []
            text = path.read_text(encoding="utf-8", errors="replace")
            for number, line in enumerate(text.splitlines(), 1):
                try:
                    step = json.loads(line)["step"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    log.warning("%s:%d: torn line dropped", path, number)
                    continue
                if step <= resume_step:
                    kept.append(line + "\n")
            write_text(path, "".join(kept))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def provenance(**facts: Any) -> dict[str, Any]:
    """Where a run's numbers come from: command, code, versions, machine, and what is passed in."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "versions": versions,
        **facts,
    }


def record_provenance(path: Path, **facts: Any) -> None:
    """Append this start to `provenance.json`, a list with one entry per start of the run."""
    starts: list[Any] = []
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: not JSON ({error}); move it away") from error
        if not isinstance(starts, list):
            raise RunError(f"{path}: not a list of starts; move it away")
    write_json(path, [*starts, provenance(**facts)])


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    result = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


class Progress:
    """A progress bar on rank 0 of a terminal; elsewhere a log line now and then."""

    def __init__(
        self,
        total: int,
        *,
        start: int,
        what: str,
        unit: str = "step",
        every_seconds: float = 30.0,
    ) -> None:
        self._is_terminal = sys.stderr.isatty() and rank() == 0
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=what,
            unit=unit,
            disable=not self._is_terminal,
            dynamic_ncols=True,
        )
        self._what, self._total, self._done, self._first = what, total, start, start
        self._every, self._begun, self._last = every_seconds, time.monotonic(), time.monotonic()

    def advance(self, text: str) -> None:
        """One step further; `text` says how it goes (loss, tokens/s)."""
        self._done += 1
        self._bar.update()
        self._bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        if not self._is_terminal and (now - self._last > self._every or self._done == self._total):
            left = (now - self._begun) / (self._done - self._first) * (self._total - self._done)
            log.info(
                "%s %d/%d  %s  %s left",
                self._what,
                self._done,
                self._total,
                text,
                time.strftime("%H:%M:%S", time.gmtime(left)),
            )
            self._last = now

    def skip(self, count: int) -> None:
        """So many steps less to do."""
        self._total -= count
        self._bar.total = self._total

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
