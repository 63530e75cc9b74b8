"""From a recipe's `tasks` part to tasks: one row per suite."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhr_scale.config import (
    EvalTasksConfig,
    HeldOutTasks,
    JsonlTasks,
    SuperNITasks,
    T0Tasks,
    TasksConfig,
    ToyTasks,
)
from mhr_scale.errors import DataError
from mhr_scale.tasks import held_out, jsonl, superni, t0, toy
from mhr_scale.tasks.task import Intake, Task, TaskStream, check_not_empty


@dataclass(frozen=True, slots=True)
class Reading:
    """A suite being read: its tasks in the order of their numbers, and what is refused on the way.

    A task without a training row is an error. `intake` is complete, and may be checked, once the
    last task has been read.
    """

    tasks: Iterator[Task]
    n_tasks: int
    intake: Intake


def _read_toy(config: ToyTasks, intake: Intake) -> list[Task]:
    return toy.make_tasks(config) if config.fold == "train" else toy.held_out_tasks(config)


READERS: dict[type, Callable[[Any, Intake], Sequence[Task] | TaskStream]] = {
    ToyTasks: _read_toy,
    SuperNITasks: superni.read_tasks,
    JsonlTasks: jsonl.read_tasks,
    T0Tasks: t0.read_tasks,
    HeldOutTasks: held_out.read_tasks,
}


def read_evaluation(
    config: EvalTasksConfig, *, examples: int | None, use_held_out: bool = True
) -> tuple[list[Task], Intake]:
    """Tasks with the rows that count as their `test`: test rows, else held-out ones.

    Held-out rows that count as `test` are not in `validation` any more; without `use_held_out`
    they never count. `examples` keeps a task's first ones. Raises `DataError` for a task without
    any.
    """
    intake = Intake(on_bad=config.intake.on_bad if not isinstance(config, ToyTasks) else "reject")
    tasks = []
    for task in READERS[type(config)](config, intake):
        if not task.test and use_held_out:
            task = replace(task, test=task.validation, validation=())
        if not task.test:
            wanted = "test row and no held-out row" if use_held_out else "test row"
            raise DataError(f"task {task.name}: no {wanted} to evaluate on; {_more_rows(config)}")
        tasks.append(replace(task, test=task.test[:examples]))
    intake.check()
    return tasks, intake


def _more_rows(config: EvalTasksConfig) -> str:
    """Say how a task gets rows to evaluate on."""
    if isinstance(config, JsonlTasks):
        return f"add its rows to a test.jsonl in {config.folder}"
    is_test_task = isinstance(config, SuperNITasks) and config.fold == "test"
    return f"raise tasks.{'test' if is_test_task else 'validation'}_examples"


def open_suite(config: TasksConfig, *, on_bad: str | None = None) -> Reading:
    """Start to read a suite; raises `DataError` for what cannot be used.

    `on_bad` overrides the recipe's policy for unusable rows.
    """
    policy = getattr(config, "intake", None)
    intake = Intake(on_bad=on_bad or (policy.on_bad if policy else "reject"))
    tasks = READERS[type(config)](config, intake)
    return Reading(_checked(tasks), len(tasks), intake)


def _checked(tasks: Iterable[Task]) -> Iterator[Task]:
    for task in tasks:
        check_not_empty(task)
        yield task


def source_files(config: TasksConfig) -> list[Path]:
    """The local files a suite is read from, sorted; none where it is made or fetched."""
    names = [getattr(config, field, None) for field in ("folder", "source", "templates")]
    folders = [Path(name) for name in names if name and Path(name).is_dir()]
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
