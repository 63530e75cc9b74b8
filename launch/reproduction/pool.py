"""Units in worker processes: dependencies, progress with the time left, failures logged at once.

Every unit has its own process, forked from a server that has imported everything: it starts fast,
and if it is killed nothing else is affected. When asked to stop, the pool asks its units to save.
"""

import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

from mhr_scale.errors import ExitCode
from mhr_scale.run import stopping
from mhr_scale.run.runlog import as_time, log
from reproduction.units import log_file, read_record, work, write_record
from reproduction.units_to_run import Unit

Fate = Literal["done", "diverged", "failed", "left out"]

#: The environment of units: one thread each, and no accelerator.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}
#: Imported once by the server: the units, and what verbs import late, which takes seconds.
PRELOADED = [
    "reproduction.units",
    "deepspeed",
    "pandas",
    "torch._dynamo",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.t5.modeling_t5",
    "transformers.tokenization_utils_fast",
]


@dataclass(slots=True)
class Clock:
    """Progress in expected seconds, and the time it took; from both, the time left."""

    total: float
    workers: int
    expected: float = 0.0
    """Expected seconds of the units that have ended in this start."""
    took: float = 0.0
    """What they took."""
    settled: float = 0.0
    """Expected seconds of all units that need not run any more, those included."""

    def end(self, unit: Unit, seconds: float) -> None:
        """A unit has ended."""
        self.expected += unit.seconds
        self.took += seconds
        self.settled += unit.seconds

    def skip(self, unit: Unit) -> None:
        """A unit need not run."""
        self.settled += unit.seconds

    def left(self) -> str:
        """The time left, extrapolated from the units that have ended."""
        pace = self.took / self.expected if self.expected else 1.0
        seconds = max(0.0, self.total - self.settled) * pace / self.workers
        return as_time(seconds)


@dataclass(slots=True)
class Pool:
    """Runs units, at most `workers` at a time."""

    root: Path
    recipes: Path
    workers: int
    clock: Clock
    fates: dict[str, Fate] = field(default_factory=dict)
    processor_seconds: float = 0.0
    """Of all finished units, those of earlier starts included."""

    @property
    def failed(self) -> list[str]:
        """The units that failed, or waited for one that did."""
        return sorted(name for name, fate in self.fates.items() if fate in ("failed", "left out"))

    def run(self, units: Sequence[Unit]) -> None:
        """Run what is not done yet, in order where dependencies allow.

        Raises `stopping.Stopped` when asked to stop and all running units have saved.
        """
        waiting = [unit for unit in units if not self._is_settled(unit)]
        count = len(units)
        if len(waiting) < count:
            log.info("%d of %d units are done already", count - len(waiting), count)
        os.environ.update(ENVIRONMENT)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        running: dict[ForkServerProcess, tuple[Unit, float]] = {}
        with stopping.held():
            while waiting or running:
                self._leave_out(waiting)
                while waiting and len(running) < self.workers and not stopping.is_asked():
                    unit = next((u for u in waiting if self._is_ready(u)), None)
                    if unit is None:
                        break
                    waiting.remove(unit)
                    process = context.Process(target=work, args=(unit, self.root, self.recipes))
                    process.start()
                    running[process] = (unit, time.monotonic())
                if stopping.is_asked():
                    self._stop(running)
                multiprocessing.connection.wait([p.sentinel for p in running], timeout=1.0)
                for process in [p for p in running if not p.is_alive()]:
                    unit, begun = running.pop(process)
                    seconds = time.monotonic() - begun
                    self._end(unit, process.exitcode, seconds)
                    log.info(
                        "[%d/%d] %s %s, %.0f s; %s left",
                        count - len(waiting) - len(running),
                        count,
                        unit.name,
                        self.fates[unit.name],
                        seconds,
                        self.clock.left(),
                    )

    def _is_settled(self, unit: Unit) -> bool:
        record = read_record(self.root, unit)
        if record is None:
            return False
        self.fates[unit.name] = record.outcome
        self.processor_seconds += record.processor_seconds
        self.clock.skip(unit)
        return True

    def _is_ready(self, unit: Unit) -> bool:
        return all(self.fates.get(name) == "done" for name in unit.needs)

    def _leave_out(self, waiting: list[Unit]) -> None:
        """Remove units that can never run: diverged if what they need is, else left out."""
        for unit in list(waiting):
            faults = {self.fates.get(name) for name in unit.needs} - {None, "done"}
            if not faults:
                continue
            waiting.remove(unit)
            self.clock.skip(unit)
            if faults == {"diverged"}:
                write_record(self.root, unit, "diverged", begun=None)
                self.fates[unit.name] = "diverged"
            else:
                self.fates[unit.name] = "left out"

    def _end(self, unit: Unit, code: int | None, seconds: float) -> None:
        self.clock.end(unit, seconds)
        record = read_record(self.root, unit) if code == ExitCode.DONE else None
        self.fates[unit.name] = record.outcome if record else "failed"
        if record is not None:
            self.processor_seconds += record.processor_seconds
        else:
            file = log_file(self.root, unit)
            ending = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
            log.error("%s failed (%s): %s; %s", unit.name, ending, _last_line(file), file)

    def _stop(self, running: dict[ForkServerProcess, tuple[Unit, float]]) -> None:
        """Ask the running units to save and exit, wait for them, and raise `Stopped`."""
        log.info("stopping: %d unit(s) save what they have", len(running))
        for process in running:
            process.terminate()
        for process in running:
            process.join()
        raise stopping.stop("finished units are kept, the others go on from their last save")


def _last_line(file: Path) -> str:
    """The last line of a log that is not empty."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
