"""The 11 tasks that T0 holds out: their evaluation rows, rendered as prompts, and their shots.

Under `templates_mode: draw` a row gives one example, whose id is the row's number; its template is
drawn from (seed, task, number) alone, so that it is the same on every machine, on any number of
ranks and for any order of rows. Under `all` a row gives one example per template and the id is
"<number>/<template name>": what follows the first slash names the prompt a score belongs to.

Without StoryCloze's rows, and unless it is asked for by name, the suite is ten tasks and a warning.
"""

import json
from collections.abc import Iterator
from dataclasses import field, replace
from pathlib import Path
from typing import Literal, Self

from mhr_scale.errors import ConfigError, DataError
from mhr_scale.recipe.part import part
from mhr_scale.run.runlog import log
from mhr_scale.tasks.suite import FewShotTask, ShotsConfig, Suite, set_aside
from mhr_scale.tasks.t0.bounds import UnboundedTemplateError
from mhr_scale.tasks.t0.held_out_prompts import Prompts
from mhr_scale.tasks.t0.held_out_rows import (
    TASKS,
    HeldOut,
    RawRow,
    Reader,
    find_rows,
    find_task,
    open_storycloze,
    read_rows,
    what_is_there,
)
from mhr_scale.tasks.t0.held_out_shots import (
    check_shots,
    draw_rows,
    read_shots,
    selection_examples,
    train_examples,
)
from mhr_scale.tasks.task import Example, Intake, IntakeConfig, Task


@part
class HeldOutTasks(Suite):
    """The 11 tasks that T0 holds out: evaluation rows under their original-task prompts."""

    suite: Literal["t0_eval"]
    """Chooses this part."""
    templates: str
    """Folder of promptsource templates, `<data set>[/<subset>]/templates.yaml`."""
    source: Literal["local", "hub"] = "local"
    """Where raw rows come from: files below `folder`, or the Hugging Face hub."""
    folder: str | None = None
    """Raw rows under `source: local`: `<task>.<split>.jsonl`, `<task>/<split>.jsonl` or saved."""
    storycloze: str | None = None
    """Manual file of StoryCloze's test rows (CSV as handed out, or JSONL); null = do without."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; empty = all 11."""
    missing: Literal["error", "skip"] = "error"
    """What a task without rows does."""
    anli_split: Literal["test", "dev"] = "test"
    """Which rows score ANLI: test as T-Few and MHR do, dev as T0 does."""
    templates_mode: Literal["draw", "all"] = "draw"
    """draw: one template per row, by `seed`; all: every row under every template."""
    seed: int = 42
    """Seed of the templates drawn and of templates that choose their wording."""
    max_characters: int = 2048
    """Characters kept of every field that a template inserts."""
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    """Policy for unusable rows."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        if self.source == "local" and self.folder is None:
            raise ConfigError(
                "tasks.folder: not set; name the folder of raw rows or use source: hub"
            )

    trains = False

    def read_tasks(self, intake: Intake) -> list[Task]:
        """Read the evaluation rows of every task asked for, as the test examples of its `Task`."""
        made, short = [], []
        for task, reader in _find_all(self):
            prompts = _open_prompts(task, self)
            examples, used = [], set()
            for row in read_rows(task, reader, intake):
                for example in _render(prompts, row, config=self, intake=intake):
                    examples.append(example)
                    used.add(row.idx)
            prompts.warn_left_out()
            made.append(Task(name=task.name, train=(), test=tuple(examples), metric="accuracy"))
            if 0 < len(used) < task.size:
                short.append(f"{task.name} {len(used)} of {task.size}")
        intake.check()
        empty = ", ".join(task.name for task in made if not task.test)
        if empty:
            raise DataError(f"no usable evaluation row in task(s) {empty}; mend their files")
        if short:
            log.warning(
                "not the whole evaluation split, scores are not comparable: %s", ", ".join(short)
            )
        return made

    def folders(self) -> tuple[str, ...]:
        """The templates, and the raw rows where they are local."""
        return (self.templates, *filter(None, (self.folder,)))

    def only(self, task: str) -> Self:
        """Read this task's rows alone."""
        return replace(self, tasks=(task,))

    def at_seed(self, seed: int) -> Self:
        """The seed draws the templates."""
        return replace(self, seed=seed)

    def check_few_shot(self, shots: ShotsConfig) -> None:
        """Every held-out task can be adapted on, with shots of T-Few's files or drawn ones."""

    def draw_shots(self, task: Task, shots: ShotsConfig, *, seed: int) -> FewShotTask:
        """Shots are raw rows, each under a template drawn for every epoch."""
        held_out = find_task(task.name)
        if shots.folder is None:
            reader = find_rows(held_out, held_out.train, folder=_raw_folder(self))
            if reader is None:
                raise DataError(
                    f"{self.folder or 'the hub'}: no rows of {task.name} to draw shots from; add "
                    f"its split '{held_out.train}' or few-shot files"
                )
            rows = draw_rows(reader, task.name, seed=seed, shots=shots.count)
        else:
            rows = read_shots(Path(shots.folder), task.name, seed=seed, shots=shots.count)
        kept, aside = set_aside(rows, task=task.name, count=shots.set_aside)
        prompts = _open_prompts(held_out, self)
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


def _open_prompts(task: HeldOut, config: HeldOutTasks) -> Prompts:
    folder = Path(config.templates)
    return Prompts(task, folder=folder, max_characters=config.max_characters, seed=config.seed)


def _raw_folder(config: HeldOutTasks) -> Path | None:
    """The folder of raw rows; None = the hub."""
    return None if config.source == "hub" or config.folder is None else Path(config.folder)


def _render(
    prompts: Prompts, row: RawRow, *, config: HeldOutTasks, intake: Intake
) -> Iterator[Example]:
    def refuse(error: ValueError) -> None:
        text = json.dumps(row.fields, ensure_ascii=False, default=str)
        intake.refuse(place=row.place, task=prompts.task.name, reason=str(error), text=text)

    is_drawn = config.templates_mode == "draw"
    try:
        templates = [prompts.draw(row, seed=config.seed)] if is_drawn else prompts.applicable(row)
    except ValueError as error:
        return refuse(error)
    for template in templates:
        id = str(row.idx) if is_drawn else f"{row.idx}/{template.name}"
        try:
            example = prompts.example(template, row, id=id)
        except UnboundedTemplateError:
            raise
        except ValueError as error:
            refuse(error)
        else:
            intake.take()
            yield example


def _find_all(config: HeldOutTasks) -> list[tuple[HeldOut, Reader]]:
    """Find the evaluation rows of every task asked for, or say which tasks have none."""
    place = config.folder or "the hub"
    asked = {find_task(name).name for name in config.tasks} or TASKS.keys()
    splits = {
        name: task.evaluation_split(config.anli_split)
        for name, task in TASKS.items()
        if name in asked
    }
    readers: dict[str, Reader | None] = {}
    for name, split in splits.items():
        if name == "storycloze" and config.storycloze:
            readers[name] = open_storycloze(Path(config.storycloze))
        else:
            readers[name] = find_rows(TASKS[name], split, folder=_raw_folder(config))
    tasks = [(TASKS[name], reader) for name, reader in readers.items() if reader]
    missing = [name for name, reader in readers.items() if not reader]
    if "storycloze" in missing and "storycloze" not in config.tasks:
        missing.remove("storycloze")
        log.warning(
            "storycloze left out: its rows are handed out on request only. A mean of this suite is "
            "over %d tasks instead of 11; name the file in tasks.storycloze",
            len(tasks),
        )
    if missing:
        folder = None if config.folder is None else Path(config.folder)
        listed = ", ".join(
            what_is_there(TASKS[name], splits[name], folder=folder) for name in missing
        )
        if config.missing == "error":
            raise DataError(
                f"{place}: no evaluation rows of {len(missing)} task(s): {listed}; add "
                "<task>.<split>.jsonl, choose ANLI's split by tasks.anli_split or set "
                "tasks.missing: skip"
            )
        log.warning("%d task(s) skipped, no evaluation rows: %s", len(missing), listed)
    if not tasks:
        raise DataError(f"{place}: no evaluation rows of any task asked for")
    return tasks
