"""Training rows of the held-out tasks: a few per task and seed, as T-Few draws them.

T-Few's files are `<folder>/<task>/<K>_shot/<seed>_seed.jsonl`: K raw rows in the schema of the data
set, drawn by shuffling the whole train split with NumPy's `RandomState(seed)` and taking the first
K. Fewer shots of a seed are therefore the first lines of its file: the 32 that MHR takes of ANLI
open the file of T-Few's 50. A task may lie in a folder of T-Few's name for it (`h-swag`).

Where there is no file, the same draw from the train split gives the same rows.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.json_lines import JsonLine, iter_rows
from mhr_scale.tasks.t0.held_out_prompts import Prompts
from mhr_scale.tasks.t0.held_out_rows import HeldOut, RawRow, Reader, find_task, read_rows
from mhr_scale.tasks.t0.prompts import Template
from mhr_scale.tasks.task import Example, Intake

T = TypeVar("T")


def has_shots(folder: Path, task: str) -> bool:
    """Whether a folder has few-shot files of a task, of whatever seed and number."""
    return bool(_list_counts(folder, find_task(task)))


def read_shots(folder: Path, task: str, *, seed: int, shots: int | None = None) -> list[RawRow]:
    """Read the few-shot rows of a seed; `shots` is T-Few's number for the task by default.

    Fewer shots than a file holds are its first lines.
    """
    held_out = find_task(task)
    shots = _count(held_out, shots)
    counts = _list_counts(folder, held_out)
    if not counts:
        raise DataError(f"{folder}: no few-shot files of {task}; expected {task}/<K>_shot/*.jsonl")
    enough = [count for count in sorted(counts) if count >= shots]
    if not enough:
        there = ", ".join(map(str, sorted(counts)))
        raise DataError(f"{folder}: no {shots} shots of {task}; the files there have {there}")
    count = enough[0]
    path = counts[count] / f"{seed}_seed.jsonl"
    if not path.is_file():
        there = ", ".join(map(str, _list_seeds(counts[count]))) or "none"
        raise DataError(f"{path}: no seed {seed} of {task}; seeds there: {there}")

    def reader(intake: Intake) -> Iterator[JsonLine]:
        return iter_rows(path, task=task, intake=intake)

    rows = _read_all(held_out, reader)
    if len(rows) != count:
        raise DataError(
            f"{path}: {len(rows)} rows, expected the {count} that its folder tells; mend the file"
        )
    return rows[:shots]


def list_seeds(folder: Path, task: str) -> list[int]:
    """Return the seeds for which a folder has few-shot files of a task."""
    folders = _list_counts(folder, find_task(task)).values()
    return sorted({seed for folder in folders for seed in _list_seeds(folder)})


def draw_rows(reader: Reader, task: str, *, seed: int, shots: int | None = None) -> list[RawRow]:
    """Draw few-shot rows from the train split, which `reader` reads.

    A line that is no JSON object is an error, for without it the draw would be another one; what
    else is wrong with a row counts only if it is drawn.
    """
    held_out = find_task(task)
    shots = _count(held_out, shots)
    intake = Intake(on_bad="skip")
    lines = list(reader(intake))
    _check_none_refused(intake)
    if len(lines) < shots:
        raise DataError(f"{task}: {len(lines)} rows cannot fill {shots} shots; add rows")
    drawn = first_shuffled(lines, seed=seed, count=shots)
    return _read_all(held_out, lambda _: iter(drawn))


def first_shuffled(rows: Sequence[T], *, seed: int, count: int) -> list[T]:
    """Return the first rows of T-Few's shuffle, which moves all rows whatever the count."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed} of a few-shot draw is not in 0..{2**32 - 1}")
    order = list(range(len(rows)))
    np.random.RandomState(seed).shuffle(order)
    return [rows[number] for number in order[:count]]


def train_examples(
    prompts: Prompts, rows: Sequence[RawRow], *, seed: int, epoch: int
) -> tuple[Example, ...]:
    """Return the rows as the training examples of one epoch, each under a template drawn for it.

    The draw, and what a template itself chooses at random, follow from (seed, task, number of the
    row, epoch) alone. The id of an example is "<number of the row>/<template name>".
    """
    made = []
    for row in rows:
        with _blaming(row):
            template = prompts.draw(row, seed=seed, epoch=epoch)
            made.append(_example(prompts, row, template, salt=f"/{seed}/{epoch}"))
    return tuple(made)


def selection_examples(
    prompts: Prompts, rows: Sequence[RawRow], *, seed: int
) -> tuple[Example, ...]:
    """Return the rows as evaluation rows are: each under one template, its number as its id."""
    made = []
    for row in rows:
        with _blaming(row):
            template = prompts.draw(row, seed=seed)
            made.append(prompts.example(template, row, id=str(row.idx)))
    return tuple(made)


def check_shots(prompts: Prompts, rows: Sequence[RawRow]) -> tuple[Example, ...]:
    """Return the rows under each of their templates, for epochs draw them all.

    Raises `DataError` if a row is of no use under one of them. Ids are those of `train_examples`.
    """
    made = []
    for row in rows:
        with _blaming(row):
            for template in prompts.applicable(row):
                made.append(_example(prompts, row, template, salt=""))
    return tuple(made)


@contextmanager
def _blaming(row: RawRow) -> Iterator[None]:
    """Say where the row stands that a `ValueError` is about."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{row.place}: {error}; mend the row") from error


def _example(prompts: Prompts, row: RawRow, template: Template, *, salt: str) -> Example:
    return prompts.example(template, row, id=f"{row.idx}/{template.name}", salt=salt)


def _count(task: HeldOut, shots: int | None) -> int:
    if shots is not None and shots < 1:
        raise ConfigError(f"shots: {shots} is not at least 1")
    return task.shots if shots is None else shots


def _read_all(task: HeldOut, reader: Reader) -> list[RawRow]:
    """Read rows of which every single one is needed."""
    intake = Intake(on_bad="skip")
    rows = list(read_rows(task, reader, intake))
    _check_none_refused(intake)
    return rows


def _check_none_refused(intake: Intake) -> None:
    for reject in intake.rejects:
        raise DataError(f"{reject.place}: {reject.reason} (task {reject.task}); mend the row")


def _list_counts(folder: Path, task: HeldOut) -> dict[int, Path]:
    """Return the folders of a task's few-shot files by their number of rows."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of few-shot files")
    paths = [path for name in (task.alias, task.name) if name for path in folder.glob(f"{name}/*")]
    matches = {path: re.fullmatch("([0-9]+)_shot", path.name) for path in paths if path.is_dir()}
    return {int(match[1]): path for path, match in matches.items() if match}


def _list_seeds(folder: Path) -> list[int]:
    matches = (re.fullmatch(r"([0-9]+)_seed\.jsonl", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)
