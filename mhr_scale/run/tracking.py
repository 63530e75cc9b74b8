"""Tracking: the lines of `metrics.jsonl`, also sent to the trackers that the recipe names.

`metrics.jsonl` is the record. A tracker that fails is left out with one warning, and the run goes
on; without `run.trackers` no tracker's package is imported.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mhr_scale.errors import first_line
from mhr_scale.run import extras
from mhr_scale.run.runlog import log
from mhr_scale.run.trackers import KINDS, MLFLOW_LOCAL, Curves, Tracker

#: Takes a line of `metrics.jsonl`.
Take = Callable[[Mapping[str, Any]], None]


def check(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker whose package is not installed."""
    for name in names:
        local = MLFLOW_LOCAL if name == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ else ()
        for module in (name, *local):
            extras.check(module, what="run.trackers", way_out=", or leave it out")


class Tracking:
    """The trackers of a launch: none can stop it, and one that fails once is not tried again.

    Of a run, rank 0 alone names trackers; of jobs, every rank, for its own.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._working = list(names)

    @contextmanager
    def opened(self, curves: Curves) -> Iterator[Take | None]:
        """A function to call with every line of a `metrics.jsonl`; None without trackers.

        Several can be open at a time, of jobs that step together.
        """
        trackers: dict[str, Tracker] = {}
        for name in tuple(self._working):
            with self._guarded(name):
                trackers[name] = KINDS[name](curves)

        def take(values: Mapping[str, Any]) -> None:
            numbers = numbers_of(values)
            step = int(numbers.pop("step"))
            for name, tracker in trackers.items():
                with self._guarded(name) as works:
                    if works:
                        tracker.log(step, numbers)

        try:
            yield take if trackers else None
        finally:
            for name, tracker in trackers.items():
                with self._guarded(name) as works:
                    if works:
                        tracker.close()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[bool]:
        """A call of a tracker, which may fail; whether it has not done so yet."""
        try:
            yield name in self._working
        except Exception as error:
            self._working.remove(name)
            log.warning(
                "run.trackers: %s failed and is left out, metrics.jsonl has everything: %s",
                name,
                first_line(error),
            )


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line, nested ones as `outer/inner`; other values are left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= numbers_of(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat
