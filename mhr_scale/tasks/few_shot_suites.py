"""From a recipe's `tasks` and `shots` parts to the few-shot tasks of one seed.

What a seed changes, by suite:

    toy       which training rows are its shots, and their order; `fold: held_out` only
    superni   the shuffle that gives training and validation rows; `fold: test` only
    jsonl     which training rows are its shots, and their order
    t0_eval   which rows of the train split are its shots (T-Few's files, or the same draw), the
              template of every shot in every epoch and that of every evaluation row

Test rows are the same for every seed. Fewer shots of a seed are the first ones of more. Validation
rows that count as test rows (jsonl without `test.jsonl`) are not offered as validation as well.
Which of several references a row trains on is the protocol's to say, not that of `tasks`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mhr_scale.config import EvalTasksConfig, HeldOutTasks, JsonlTasks, SuperNITasks, ToyTasks
from mhr_scale.config.adaptation import ShotsConfig
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.tasks.fewshot import (
    check_shots,
    draw_shots,
    read_shots,
    selection_examples,
    train_examples,
)
from mhr_scale.tasks.held_out import Prompts
from mhr_scale.tasks.held_out_rows import find_task
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.tasks.task import Example, Intake, Task, check_not_empty

T = TypeVar("T")

MORE_ROWS = {
    ToyTasks: "raise tasks.train_examples",
    SuperNITasks: "raise tasks.train_examples",
    JsonlTasks: "add rows to its train.jsonl (some of them may be set aside for validation, see "
    "tasks.validation_examples)",
}
"""How a task gets more training rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotTask:
    """A task as the jobs of one seed see it.

    `task.train` holds every training example that an epoch may draw: under t0_eval each shot under
    each template that applies to it. `task.test` is not empty. `n_rows` is the number of examples
    of an epoch; `draw(epoch)` returns them, one per row and in the order of the rows, as a pure
    function of (seed, task, epoch). `selection` are the shots set aside, which no epoch draws.
    """

    task: Task
    seed: int
    n_rows: int
    draw: Callable[[int], tuple[Example, ...]]
    selection: tuple[Example, ...]


def read_few_shot(
    config: EvalTasksConfig, shots: ShotsConfig, *, seed: int, examples: int | None
) -> tuple[list[FewShotTask], Intake]:
    """Read the few-shot tasks of a seed, in the order of the suite.

    `examples` keeps a task's first test rows. Refused rows of the suite are counted in the intake
    and checked; a row that is drawn as a shot of t0_eval is never refused but an error.
    """
    _check(config, shots)
    if isinstance(config, SuperNITasks | HeldOutTasks):
        config = replace(config, seed=seed)
    has_fixed_validation = isinstance(config, JsonlTasks)
    tasks, intake = read_evaluation(config, examples=examples, use_held_out=has_fixed_validation)
    if isinstance(config, HeldOutTasks):
        return [_prompted(task, config, shots, seed=seed) for task in tasks], intake
    made = []
    for task in tasks:
        check_not_empty(task)
        rows = list(task.train)
        if not isinstance(config, SuperNITasks):  # whose seed has shuffled them
            random.Random(f"{seed}/{task.name}/shots").shuffle(rows)
        chosen = _first(rows, task=task.name, count=shots.count, way_out=MORE_ROWS[type(config)])
        made.append(_plain(task, chosen, shots, seed=seed))
    return made, intake


def _check(config: EvalTasksConfig, shots: ShotsConfig) -> None:
    if isinstance(config, ToyTasks) and config.fold != "held_out":
        raise ConfigError(
            f"tasks.fold: {config.fold} tasks were trained on; the few-shot tasks of suite toy are "
            "fold: held_out"
        )
    if isinstance(config, SuperNITasks) and config.fold != "test":
        raise ConfigError(
            f"tasks.fold: {config.fold} tasks were trained on; the few-shot tasks of suite superni "
            "are fold: test"
        )
    if isinstance(config, SuperNITasks) and config.references == "all":
        raise ConfigError(
            "tasks.references: all makes several rows of one shot; leave it out, "
            "protocol.references says which reference a shot trains on"
        )
    if shots.folder is not None and not isinstance(config, HeldOutTasks):
        raise ConfigError(
            f"shots.folder: {shots.folder} holds shots of suite t0_eval; suite {config.suite} "
            "draws its own, leave it out"
        )


def _plain(task: Task, shots: Sequence[Example], config: ShotsConfig, *, seed: int) -> FewShotTask:
    """Make a task whose shots are the same examples in every epoch."""
    kept, aside = _divide(shots, task=task.name, set_aside=config.set_aside)
    train = tuple(kept)
    return FewShotTask(
        task=replace(task, train=train),
        seed=seed,
        n_rows=len(train),
        draw=lambda epoch: train,
        selection=tuple(aside),
    )


def _prompted(task: Task, config: HeldOutTasks, shots: ShotsConfig, *, seed: int) -> FewShotTask:
    """Make a task whose shots are raw rows, each under a template drawn for every epoch."""
    if shots.folder is None:
        rows = draw_shots(config, task.name, seed=seed, shots=shots.count)
    else:
        rows = read_shots(Path(shots.folder), task.name, seed=seed, shots=shots.count)
    kept, aside = _divide(rows, task=task.name, set_aside=shots.set_aside)
    prompts = Prompts(find_task(task.name), config)
    train = check_shots(prompts, kept)
    selection = selection_examples(prompts, aside, seed=seed)
    prompts.warn_left_out()
    return FewShotTask(
        task=replace(task, train=train),
        seed=seed,
        n_rows=len(kept),
        draw=lambda epoch: train_examples(prompts, kept, seed=seed, epoch=epoch),
        selection=selection,
    )


def _first(
    rows: Sequence[Example], *, task: str, count: int | None, way_out: str
) -> Sequence[Example]:
    if count is not None and len(rows) < count:
        raise DataError(
            f"task {task}: {len(rows)} training rows cannot fill {count} shots; lower shots.count "
            f"or {way_out}"
        )
    return rows[:count]


def _divide(rows: Sequence[T], *, task: str, set_aside: int) -> tuple[Sequence[T], Sequence[T]]:
    """Return the shots to train on, and the last ones, which are set aside."""
    n_kept = len(rows) - set_aside
    if n_kept < 1:
        raise DataError(
            f"task {task}: {len(rows)} shots and shots.set_aside {set_aside} leave none to train "
            "on; lower shots.set_aside"
        )
    return rows[:n_kept], rows[n_kept:]
