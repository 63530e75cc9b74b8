"""From a recipe's `tasks` part to tasks: one row per suite."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mhr_scale.config import JsonlTasks, SuperNITasks, T0Tasks, TasksConfig, ToyTasks
from mhr_scale.errors import DataError
from mhr_scale.runlog import log
from mhr_scale.tasks import jsonl, superni, toy
from mhr_scale.tasks.task import Intake, Task, check_not_empty


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks in the order of their numbers, and what the reader took and refused."""

    tasks: list[Task]
    intake: Intake


def _read_toy(config: ToyTasks, intake: Intake) -> list[Task]:
    return toy.make_tasks(config)


def _read_t0(config: T0Tasks, intake: Intake) -> list[Task]:
    raise DataError(
        f"tasks.suite: the P3 reader ({config.source}, mixture {config.mixture}) is not part of "
        "this version; use suite jsonl, superni or toy"
    )


READERS: dict[type, Callable[[Any, Intake], list[Task]]] = {
    ToyTasks: _read_toy,
    SuperNITasks: superni.read_tasks,
    JsonlTasks: jsonl.read_tasks,
    T0Tasks: _read_t0,
}


def read_suite(config: TasksConfig) -> Suite:
    """Read and check all tasks of a suite; raises `DataError` for what cannot be used."""
    policy = getattr(config, "intake", None)
    intake = Intake(on_bad=policy.on_bad if policy else "reject")
    tasks = READERS[type(config)](config, intake)
    intake.check()
    check_not_empty(tasks)
    if intake.rejects:
        log.warning("%d rows refused; see rejects.jsonl in the run folder", len(intake.rejects))
    return Suite(tasks, intake)
