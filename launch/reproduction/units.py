"""Running one unit in a single-threaded process, and the record that it is done.

<root>/<unit>/               the verb's run folder, in which it resumes after an interruption
<root>/records/<unit>.json   written when it is done: its settings, outcome and seconds
<root>/logs/<unit>.log       its stdout and stderr
"""

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from mhr_scale.config import (
    AdaptConfig,
    AnalyseConfig,
    AverageConfig,
    EvaluateConfig,
    PretrainConfig,
)
from mhr_scale.errors import DivergenceError, ExitCode, RunError, UserError
from mhr_scale.recipe.reading import load
from mhr_scale.run import failures, stopping
from mhr_scale.run.files import read_object, write_json
from mhr_scale.run.runlog import start_logging
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.analyse import analyse
from mhr_scale.verbs.average import average
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.pretrain import pretrain
from reproduction.units_to_run import Unit

Outcome = Literal["done", "diverged"]

VERBS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "pretrain": (PretrainConfig, pretrain),
    "adapt": (AdaptConfig, adapt),
    "average": (AverageConfig, average),
    "evaluate": (EvaluateConfig, evaluate),
    "analyse": (AnalyseConfig, analyse),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The record of a finished unit."""

    settings: tuple[str, ...]
    outcome: Outcome
    seconds: float
    """Wall-clock time of its last start."""
    processor_seconds: float
    """Processor time of its last start, as on a core of its own."""


def log_file(root: Path, unit: Unit) -> Path:
    """The log of a unit."""
    return root / "logs" / f"{unit.name}.log"


def read_record(root: Path, unit: Unit) -> Record | None:
    """The record of a unit; None if it is not finished, or its run folder is gone.

    Raises `RunError` if it is damaged, or of a unit with the same name and other settings.
    """
    file = _record_file(root, unit)
    if not file.is_file():
        return None
    values = read_object(file, RunError, way_out="delete it")
    try:
        record = Record(
            settings=tuple(values["settings"]),
            outcome={"done": "done", "diverged": "diverged"}[values["outcome"]],  # type: ignore[arg-type]
            seconds=float(values["seconds"]),
            processor_seconds=float(values["processor_seconds"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not the record of a unit ({error!r}); delete it") from error
    if record.settings != _all_settings(unit):
        odd = sorted(set(record.settings) ^ set(_all_settings(unit)))
        raise RunError(
            f"{file}: the unit was run with other settings ({'; '.join(odd[:2])}); use another "
            "--folder"
        )
    is_there = record.outcome == "diverged" or (root / unit.name).is_dir()
    return record if is_there else None


def write_record(root: Path, unit: Unit, outcome: Outcome, *, begun: float | None) -> None:
    """Record that a unit is done; `begun` is its start in this process, None if it did not run."""
    file = _record_file(root, unit)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = Record(
        settings=_all_settings(unit),
        outcome=outcome,
        seconds=0.0 if begun is None else round(time.monotonic() - begun, 2),
        processor_seconds=0.0 if begun is None else round(time.process_time(), 2),
    )
    write_json(file, dataclasses.asdict(record))


def _all_settings(unit: Unit) -> tuple[str, ...]:
    return (unit.recipe, *unit.settings)


def _record_file(root: Path, unit: Unit) -> Path:
    return root / "records" / f"{unit.name}.json"


def work(unit: Unit, root: Path, recipes: Path) -> None:
    """Run a unit and exit this process with the exit code of a launched verb."""
    file = log_file(root, unit)
    file.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    torch.set_num_threads(1)
    start_logging()
    with stopping.listening():
        code = _outcome(unit, root, recipes)
    raise SystemExit(code)


def _outcome(unit: Unit, root: Path, recipes: Path) -> int:
    """Run the verb, write the record, and log what went wrong; returns the exit code."""
    begun = time.monotonic()
    try:
        schema, verb = VERBS[unit.verb]
        verb(
            load(schema, recipes / unit.recipe, [*unit.settings, f"run.folder={root / unit.name}"])
        )
        write_record(root, unit, "done", begun=begun)
        return ExitCode.DONE
    except stopping.Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return ExitCode.AGAIN
    except DivergenceError as error:
        sys.stderr.write(f"error: {error}\n")
        if not unit.may_diverge:
            return ExitCode.MISTAKE
        write_record(root, unit, "diverged", begun=begun)
        return ExitCode.DONE
    except Exception as error:
        explained = failures.explain(error)
        if isinstance(error, UserError) or explained is not None:
            sys.stderr.write(f"error: {explained.text if explained else error}\n")
            return ExitCode.MISTAKE
        sys.stderr.write("".join(traceback.format_exception(error)))
        return ExitCode.DEFECT
