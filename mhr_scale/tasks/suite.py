"""What every suite answers: its tasks, and what the jobs of one seed see of them.

A suite is the `tasks` part of a recipe: a class below, in the file that reads it, and a row of
`suites.SUITES`. `read_tasks` must be there; the rest has defaults that fit plain rows.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeVar

from mhr_scale.errors import ConfigError, DataError
from mhr_scale.recipe.part import part
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.task import (
    Chat,
    Example,
    Intake,
    IntakeConfig,
    Task,
    TaskStream,
    check_not_empty,
    group_raw,
)

T = TypeVar("T")


@part
class ShotsConfig:
    """The few examples that each task is adapted on."""

    seeds: tuple[int, ...] = (42, 1024, 0)
    """One job per task, variant and seed, which draws the examples and their order."""
    count: int | None = None
    """Training examples per task, a raw row under several prompts being one; null: T-Few's number
    (t0_eval), else all the suite gives."""
    folder: str | None = None
    """t0_eval: T-Few's few-shot files; null: the same draw from the train split."""
    set_aside: int = 0
    """Of these, examples that no job trains on, for `selection.on: shots`."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"shots.seeds: {list(self.seeds)} are not different seeds")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"shots.count: {self.count} is not at least 1")
        if self.set_aside < 0 or (self.count is not None and self.set_aside >= self.count):
            raise ConfigError(f"shots.set_aside: {self.set_aside} leaves no shot to train on")


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotTask:
    """A task as the jobs of one seed see it.

    `task.train` holds every training example that an epoch may draw: each shot under each of its
    prompts (under t0_eval, each template that applies to it). `task.test` is not empty. `n_rows` is
    the number of examples of an epoch; `draw(epoch)` returns them, one per row and in the order of
    the rows, as a pure function of (seed, task, epoch). `selection` are the shots set aside, which
    no epoch draws.
    """

    task: Task
    seed: int
    n_rows: int
    draw: Callable[[int], tuple[Example, ...]]
    selection: tuple[Example, ...]


@part
class Suite(ABC):
    """The `tasks` part of a recipe, of one suite."""

    suite: str
    """Chooses this part."""
    chat: bool = False
    """Put every input into the tokenizer's chat template, where the user says it; the targets are
    what the assistant answers."""
    system: str | None = None
    """Text of the system in front of it; null: none but what the template itself says."""

    def __post_init__(self) -> None:
        if self.system is not None and not (self.chat and self.system.strip()):
            wrong = "empty; leave it out" if self.chat else "only tasks.chat: true has a system"
            raise ConfigError(f"tasks.system: {wrong}")

    trains: ClassVar[bool] = True
    """Whether it has tasks to train on."""
    evaluates: ClassVar[bool] = True
    """Whether it has tasks to evaluate and to adapt on."""
    lends_validation: ClassVar[bool] = False
    """Whether a few-shot task without test rows is tested on its validation rows."""
    generates: ClassVar[bool] = False
    """Whether all its tasks' own metrics are of generated text."""
    selects_on: ClassVar[Literal["test", "held_out"]] = "test"
    """The default of `selection.on` for its tasks."""

    @property
    def intake(self) -> IntakeConfig:
        """The policy for unusable rows; a setting where rows can be unusable."""
        return IntakeConfig()

    @abstractmethod
    def read_tasks(self, intake: Intake) -> Sequence[Task] | TaskStream:
        """The tasks in the order of their numbers; refused rows go to `intake`."""

    def in_chat(self, task: Task) -> Task:
        """A task with what the suite says of chat templates."""
        return replace(task, chat=Chat(system=self.system) if self.chat else None)

    def folders(self) -> tuple[str, ...]:
        """The local folders (or files) that it may be read from: its `folder`, if it has one."""
        folder = getattr(self, "folder", None)
        return () if folder is None else (folder,)

    def check_source(self) -> None:
        """Raise `DataError` if a local source is not there, before anything is made of its rows."""
        folder = getattr(self, "folder", None)
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"tasks.folder: no folder '{folder}' (looked in {Path.cwd()})")

    def more_test_rows(self) -> str:
        """How a task gets more rows to evaluate on."""
        return "raise tasks.validation_examples"

    def more_train_rows(self) -> str:
        """How a task gets more rows to draw shots from."""
        return "raise tasks.train_examples"

    def target_choice(self) -> str:
        """How a training target is chosen among several references: random, first or all."""
        return "first"

    def only(self, task: str) -> Self:
        """The same suite, with no other task than this one where leaving the others out pays."""
        return self

    def at_seed(self, seed: int) -> Self:
        """The same suite as the few-shot jobs of a seed read it."""
        return self

    def check_few_shot(self, shots: ShotsConfig) -> None:
        """Raise `ConfigError` where its tasks cannot be those of few-shot jobs."""
        if shots.folder is not None:
            raise ConfigError(
                f"shots.folder: {shots.folder} holds shots of suite t0_eval; suite {self.suite} "
                "draws its own, leave it out"
            )

    def draw_shots(self, task: Task, shots: ShotsConfig, *, seed: int) -> FewShotTask:
        """The task with the first of its training rows, shuffled by the seed and its name."""
        rows = list(task.train)
        random.Random(f"{seed}/{task.name}/shots").shuffle(rows)
        return self.take_shots(task, rows, shots, seed=seed)

    def take_shots(
        self, task: Task, rows: Sequence[Example], shots: ShotsConfig, *, seed: int
    ) -> FewShotTask:
        """The task with the first of these rows as its shots, the same ones in every epoch.

        A shot is a raw row; where it has several prompts, every epoch draws one of them.
        """
        check_not_empty(task)
        count, raw_rows = shots.count, group_raw(rows)
        if count is not None and len(raw_rows) < count:
            raise DataError(
                f"task {task.name}: {len(raw_rows)} training rows cannot fill {count} shots; lower "
                f"shots.count or {self.more_train_rows()}"
            )
        kept, aside = set_aside(raw_rows[:count], task=task.name, count=shots.set_aside)

        def draw(raw_rows: Sequence[tuple[Example, ...]], epoch: int | None) -> tuple[Example, ...]:
            seeds = (seed_from(seed, task.name, prompts[0].raw_id, epoch) for prompts in raw_rows)
            return tuple(p[n % len(p)] for p, n in zip(raw_rows, seeds, strict=True))

        return FewShotTask(
            task=replace(task, train=tuple(example for prompts in kept for example in prompts)),
            seed=seed,
            n_rows=len(kept),
            draw=lambda epoch: draw(kept, epoch),
            selection=draw(aside, None),
        )


def set_aside(rows: Sequence[T], *, task: str, count: int) -> tuple[Sequence[T], Sequence[T]]:
    """Return the shots to train on, and the last `count` ones, which are set aside."""
    n_kept = len(rows) - count
    if n_kept < 1:
        raise DataError(
            f"task {task}: {len(rows)} shots and shots.set_aside {count} leave none to train "
            "on; lower shots.set_aside"
        )
    return rows[:n_kept], rows[n_kept:]
