"""The table of suites, and what is read through it: to train on, to evaluate, to adapt.

What a seed changes in few-shot tasks, by suite:

    toy       which training rows are its shots, and their order; `fold: held_out` only
    superni   the shuffle that gives training and validation rows; `fold: test` only
    crossfit  which files are read: those of the seed; `fold: test` (or `dev`) only
    jsonl     which training rows are its shots, and their order
    t0_eval   which rows of the train split are its shots (T-Few's files, or the same draw), the
              template of every shot in every epoch and that of every evaluation row

Test rows are the same for every seed. Fewer shots of a seed are the first ones of more. Validation
rows that count as test rows (jsonl without `test.jsonl`) are not offered as validation as well.
Which of several references a row trains on is the protocol's to say, not that of `tasks`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING

from mhr_scale.errors import DataError
from mhr_scale.tasks.crossfit.tasks import CrossFitTasks
from mhr_scale.tasks.jsonl import JsonlTasks
from mhr_scale.tasks.suite import FewShotTask, ShotsConfig, Suite
from mhr_scale.tasks.superni import SuperNITasks
from mhr_scale.tasks.t0.held_out import HeldOutTasks
from mhr_scale.tasks.t0.mixtures import T0Tasks
from mhr_scale.tasks.task import Intake, Task, check_not_empty
from mhr_scale.tasks.toy import ToyTasks

SUITES: tuple[type[Suite], ...] = (
    ToyTasks,
    SuperNITasks,
    CrossFitTasks,
    JsonlTasks,
    T0Tasks,
    HeldOutTasks,
)

if TYPE_CHECKING:  # type checkers want a union written out; a recipe is checked against the table
    TasksConfig = Suite
    EvalTasksConfig = Suite
else:
    TasksConfig = reduce(or_, (suite for suite in SUITES if suite.trains))
    EvalTasksConfig = reduce(or_, (suite for suite in SUITES if suite.evaluates))


@dataclass(frozen=True, slots=True)
class Reading:
    """A suite being read: its tasks in the order of their numbers, and what is refused on the way.

    A task without a training row is an error. `intake` is complete, and may be checked, once the
    last task has been read.
    """

    tasks: Iterator[Task]
    n_tasks: int
    intake: Intake


def open_suite(suite: Suite, *, on_bad: str | None = None) -> Reading:
    """Start to read a suite; raises `DataError` for what cannot be used.

    `on_bad` overrides the recipe's policy for unusable rows.
    """
    intake = Intake(on_bad=on_bad or suite.intake.on_bad)
    tasks = suite.read_tasks(intake)
    return Reading(_checked(suite, tasks, intake), len(tasks), intake)


def _checked(suite: Suite, tasks: Iterable[Task], intake: Intake) -> Iterator[Task]:
    for task in tasks:
        check_not_empty(task, refused=intake.describe_refused(task.name))
        yield suite.in_chat(task)


def read_evaluation(
    suite: Suite, *, examples: int | None, use_held_out: bool = True
) -> tuple[list[Task], Intake]:
    """Tasks with the rows that count as their `test`: test rows, else held-out ones.

    Held-out rows that count as `test` are not in `validation` any more; without `use_held_out`
    they never count. `examples` keeps a task's first ones. Raises `DataError` for a task without
    any.
    """
    intake = Intake(on_bad=suite.intake.on_bad)
    tasks = []
    for task in suite.read_tasks(intake):
        if not task.test and use_held_out:
            task = replace(task, test=task.validation, validation=())
        if not task.test:
            wanted = "test row and no held-out row" if use_held_out else "test row"
            raise DataError(
                f"task {task.name}: no {wanted} to evaluate on"
                f"{intake.describe_refused(task.name)}; {suite.more_test_rows()}"
            )
        tasks.append(suite.in_chat(replace(task, test=task.test[:examples])))
    intake.check()
    return tasks, intake


def read_few_shot(
    suite: Suite, shots: ShotsConfig, *, seed: int, examples: int | None
) -> tuple[list[FewShotTask], Intake]:
    """Read the few-shot tasks of a seed, in the order of the suite.

    `examples` keeps a task's first test rows. Refused rows of the suite are counted in the intake
    and checked; a row that is drawn as a shot of t0_eval is never refused but an error.
    """
    suite.check_few_shot(shots)
    suite = suite.at_seed(seed)
    tasks, intake = read_evaluation(suite, examples=examples, use_held_out=suite.lends_validation)
    return [suite.draw_shots(task, shots, seed=seed) for task in tasks], intake


def source_files(suite: Suite) -> list[Path]:
    """The local files a suite is read from, sorted; none where it is made or fetched."""
    places = [Path(name) for name in suite.folders()]
    found = {path for place in places for path in (place, *place.rglob("*")) if path.is_file()}
    return sorted(found)
