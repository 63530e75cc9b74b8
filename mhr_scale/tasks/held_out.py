"""The 11 tasks that T0 holds out: their evaluation rows, rendered as prompts.

Templates are those that promptsource marks as the original task, sorted by name. Under
`templates_mode: draw` a row gives one example, whose id is the row's number; its template is drawn
from (seed, task, number) alone, so that it is the same on every machine, on any number of ranks and
for any order of rows. Under `all` a row gives one example per template and the id is
"<number>/<template name>": what follows the first slash names the prompt a score belongs to.

A template that names a field which a row does not have does not apply to that row: the draw is
among the others, and a warning says which templates were left out.

Without StoryCloze's rows, and unless it is asked for by name, the suite is ten tasks and a warning.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jinja2.meta import find_undeclared_variables

from mhr_scale.config.data import HeldOutTasks
from mhr_scale.errors import DataError
from mhr_scale.runlog import log
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.held_out_rows import (
    TASKS,
    HeldOut,
    RawRow,
    Reader,
    find_rows,
    find_task,
    read_rows,
    what_is_there,
)
from mhr_scale.tasks.prompts import SANDBOX, Prompter, Template, load_templates
from mhr_scale.tasks.task import Example, Intake, Task


def read_tasks(config: HeldOutTasks, intake: Intake) -> list[Task]:
    """Read the evaluation rows of every task asked for, as the test examples of its `Task`."""
    made, short = [], []
    for task, reader in _find_all(config):
        prompts = Prompts(task, config)
        examples, used = [], set()
        for row in read_rows(task, reader, intake):
            for example in _render(prompts, row, config=config, intake=intake):
                examples.append(example)
                used.add(row.idx)
        prompts.warn_left_out()
        made.append(Task(name=task.name, train=(), test=tuple(examples), metric="accuracy"))
        if 0 < len(used) < task.size:
            short.append(f"{task.name} {len(used)} of {task.size}")
    intake.check()
    empty = [task.name for task in made if not task.test]
    if empty:
        raise DataError(f"no usable evaluation row in task(s) {', '.join(empty)}; mend their files")
    if short:
        log.warning(
            "not the whole evaluation split, scores are not comparable: %s", ", ".join(short)
        )
    return made


class Prompts:
    """The templates of a held-out task, applied to its rows."""

    def __init__(self, task: HeldOut, config: HeldOutTasks) -> None:
        folder = Path(config.templates)
        found = load_templates(folder, task.dataset, task.subset)
        self.task = task
        self.templates = [one for one in found if one.is_original_task][: task.first]
        if not self.templates:
            raise DataError(f"{folder}: no template of an original task for {task.name}")
        self._fields = {template.name: _fields_of(template) for template in self.templates}
        self._prompter = Prompter(max_characters=config.max_characters, seed=config.seed)
        self._left_out: Counter[tuple[str, str]] = Counter()

    def applicable(self, row: RawRow) -> list[Template]:
        """Return the templates all of whose fields a row has; raises `ValueError` if none is."""
        chosen, missing = [], {}
        for template in self.templates:
            missing[template.name] = sorted(self._fields[template.name] - row.fields.keys())
            if not missing[template.name]:
                chosen.append(template)
        if not chosen:
            name, names = next(iter(missing.items()))
            raise ValueError(f"no template applies ('{name}' needs {', '.join(names)})")
        self._left_out.update((name, ", ".join(names)) for name, names in missing.items() if names)
        return chosen

    def draw(self, row: RawRow, *, seed: int, epoch: int | None = None) -> Template:
        """Return one of the applicable templates, drawn from the names and numbers alone."""
        templates = self.applicable(row)
        return templates[seed_from(seed, self.task.name, row.idx, epoch) % len(templates)]

    def example(self, template: Template, row: RawRow, *, id: str, salt: str = "") -> Example:
        """Render a row; the `ValueError` it raises says why the row is of no use.

        `salt` varies what a template chooses at random. The label is the row's, or the place of the
        target among the choices where a template has them in an order of its own.
        """
        row_id = f"{self.task.name}/{row.idx}{salt}"
        rendered = self._prompter.render(template, row.fields, row_id=row_id)
        if rendered is None:
            raise ValueError(f"template '{template.name}' renders nothing")
        choices, target = rendered.choices, rendered.target
        if target not in choices:
            raise ValueError(f"template '{template.name}': target {target!a} is not a choice")
        has_own_place = row.label < len(choices) and choices[row.label] == target
        return Example(
            id=id,
            input=rendered.input,
            targets=(target,),
            choices=choices,
            label=row.label if has_own_place else choices.index(target),
            place=row.place,
        )

    def warn_left_out(self) -> None:
        """Log the templates that did not apply to all rows, in one line."""
        if self._left_out:
            left_out = "; ".join(
                f"'{name}' for {count} row(s) without {names}"
                for (name, names), count in sorted(self._left_out.items())
            )
            log.warning("%s: templates left out: %s", self.task.name, left_out)


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
        except ValueError as error:
            refuse(error)
        else:
            intake.take()
            yield example


def _fields_of(template: Template) -> set[str]:
    """Return the fields of a row that a template names."""
    texts = (template.jinja, template.answer_choices or "")
    names = {name for text in texts for name in find_undeclared_variables(SANDBOX.parse(text))}
    return names - {"answer_choices", *SANDBOX.globals}


def _find_all(config: HeldOutTasks) -> list[tuple[HeldOut, Reader]]:
    """Find the evaluation rows of every task asked for, or say which tasks have none."""
    place = config.folder or "the hub"
    asked = {find_task(name).name for name in config.tasks} or TASKS.keys()
    readers = {name: find_rows(TASKS[name], config) for name in TASKS if name in asked}
    found = [(TASKS[name], reader) for name, reader in readers.items() if reader]
    missing = [name for name, reader in readers.items() if not reader]
    if "storycloze" in missing and "storycloze" not in config.tasks:
        missing.remove("storycloze")
        log.warning(
            "storycloze left out: its rows are handed out on request only. A mean of this suite is "
            "over %d tasks instead of 11; name the file in tasks.storycloze",
            len(found),
        )
    if missing:
        listed = ", ".join(what_is_there(TASKS[name], config) for name in missing)
        if config.missing == "error":
            raise DataError(
                f"{place}: no evaluation rows of {len(missing)} task(s): {listed}; add "
                "<task>.<split>.jsonl, choose ANLI's split by tasks.anli_split or set "
                "tasks.missing: skip"
            )
        log.warning("%d task(s) skipped, no evaluation rows: %s", len(missing), listed)
    if not found:
        raise DataError(f"{place}: no evaluation rows of any task asked for")
    return found
