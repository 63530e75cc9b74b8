"""CrossFit's tasks, the metric of each, and its partitions; `crossfit.json` lists them.

A partition says which tasks are trained on, which serve development and which are tested. A
partition of one's own is a JSON file of the same three lists of names, `train`, `dev` and `test`,
as CrossFit has them in `dataloader/custom_tasks_splits`; its other keys are not read.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mhr_scale.errors import DataError, some, suggest

TABLE = Path(__file__).parent / "crossfit.json"
FOLDS = ("train", "dev", "test")
#: What a partition's name ends in where it is a file of one's own.
FILE = ".json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The names of the tasks of each fold. `source` is where they were listed."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]
    source: str

    def tasks(self, fold: str) -> tuple[str, ...]:
        """The tasks of a fold; where there is none to test, those of `dev` are tested."""
        names: tuple[str, ...] = getattr(self, fold)
        return self.dev if fold == "test" and not names else names

    @property
    def in_both(self) -> list[str]:
        """The tasks that are trained on and tested too (CrossFit has one: sick, without NLI)."""
        return sorted({*self.train} & {*self.tasks("test")})


def partition_names() -> list[str]:
    """The names of CrossFit's own partitions."""
    return list(_table()["partitions"])


def metric_of(task: str) -> str:
    """CrossFit's name of a task's metric."""
    return str(_table()["metrics"][task])


def open_partition(name: str) -> Partition:
    """A partition by its name, or from a file; raises `DataError` for one that makes no sense."""
    if not name.endswith(FILE):
        lists = {fold: tuple(names) for fold, names in _table()["partitions"][name].items()}
        return Partition(**lists, source=f"partition {name}")
    lists = _read(Path(name))
    partition = Partition(**lists, source=name)
    known = _table()["metrics"]
    for fold, names in lists.items():
        unknown = [task for task in names if task not in known]
        if unknown:
            raise DataError(
                f"{name}: {fold}: {len(unknown)} unknown task(s): {some(unknown)}"
                f"{suggest(unknown[0], sorted(known))}; only CrossFit's tasks have a metric"
            )
    return partition


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    """The three lists of a file."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(
            f"tasks.partition: {path} cannot be read ({error.strerror}); give a JSON file of "
            f"lists train, dev and test, or one of {', '.join(partition_names())}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected an object with the lists {', '.join(FOLDS)}")
    lists = {fold: data.get(fold, [] if fold == "test" else None) for fold in FOLDS}
    for fold, names in lists.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}: '{fold}' is no list of names of tasks")
    return {fold: tuple(names) for fold, names in lists.items() if names is not None}
