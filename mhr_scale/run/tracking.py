"""Trackers: services that show the lines of `metrics.jsonl`, if the recipe names any.

`metrics.jsonl` is the record. A tracker that fails is disabled with one warning, and the run goes
on; without `run.trackers` no tracker's package is imported.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mhr_scale.errors import first_line
from mhr_scale.run import extras
from mhr_scale.run.files import write_text
from mhr_scale.run.runlog import log

#: File in a run folder with its Weights & Biases id, which survives a move of the folder.
WANDB_ID = Path("wandb", "mhr_scale_id.txt")
#: How long a service that cannot be reached may delay the end of a run.
FINISH_SECONDS = 120.0


class Tracker(Protocol):
    """A destination for metrics besides the run folder."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step; a step may have several calls."""

    def close(self) -> None:
        """Flush everything and close."""


class TensorBoard:
    """Event files in `<run>/tensorboard`; steps that a resumed run repeats are purged."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = str(folder / "tensorboard")
        self._writer = SummaryWriter(place, purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar for each number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, one for each run folder; `WANDB_MODE=offline` needs no network.

    Its directory is `<run>/wandb`. A resumed run keeps its id; of a step that is sent twice the
    service keeps the first value, which is the same one, since runs resume exactly.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            login_timeout=30,
        )
        resolved = folder.resolve()
        self._run = wandb.init(
            dir=str(folder),
            project=resolved.parent.name or "mhr_scale",
            name=resolved.name,
            id=wandb_id(folder),
            resume="allow",
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send the rest, as long as that takes no longer than `FINISH_SECONDS`."""
        self._run.finish()


KINDS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker whose package is not installed."""
    for name in names:
        extras.check(name, what="run.trackers")


@contextmanager
def opened(
    names: Sequence[str], folder: Path, *, resume_step: int
) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """A function to call with every line of `metrics.jsonl`; None without trackers.

    `resume_step` is the step the run resumes from, -1 for a new run. Only rank 0 names trackers.
    """
    guarded = {name: Guarded(name, folder, resume_step=resume_step) for name in names}

    def take(values: Mapping[str, Any]) -> None:
        numbers = numbers_of(values)
        step = numbers.pop("step")
        for tracker in guarded.values():
            tracker.log(int(step), numbers)

    try:
        yield take if guarded else None
    finally:
        for tracker in guarded.values():
            tracker.close()


class Guarded:
    """A tracker that cannot stop a run: at its first error it is disabled, with one warning."""

    def __init__(self, name: str, folder: Path, *, resume_step: int) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        try:
            self._tracker = KINDS[name](folder, resume_step=resume_step)
        except Exception as error:
            self._give_up(error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the numbers of a step to the tracker."""
        if self._tracker is not None:
            try:
                self._tracker.log(step, values)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """Close the tracker, if it still works."""
        if self._tracker is not None:
            try:
                self._tracker.close()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = None
        log.warning(
            "run.trackers: %s failed and is left out, metrics.jsonl has everything: %s",
            self._name,
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


def wandb_id(folder: Path) -> str:
    """The id of a run folder, stored in it: the same after every restart or move."""
    file = folder / WANDB_ID
    if file.is_file() and (stored := file.read_text(encoding="utf-8").strip()):
        return stored
    file.parent.mkdir(parents=True, exist_ok=True)
    new_id = secrets.token_hex(4)
    write_text(file, new_id + "\n")
    return new_id
