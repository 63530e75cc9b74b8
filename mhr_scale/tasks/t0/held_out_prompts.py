"""The templates of a held-out task, applied to its rows.

Templates are those that promptsource marks as the original task, sorted by name. A template that
names a field which a row does not have does not apply to that row: the draw is among the others,
and a warning says which templates were left out.
"""

from collections import Counter
from pathlib import Path

from jinja2.meta import find_undeclared_variables

from mhr_scale.errors import DataError
from mhr_scale.run.runlog import log
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.t0.held_out_rows import HeldOut, RawRow
from mhr_scale.tasks.t0.prompts import SANDBOX, Prompter, Template, load_templates
from mhr_scale.tasks.task import Example


class Prompts:
    """The templates of a held-out task, applied to its rows.

    `folder` holds the templates of all data sets; `max_characters` and `seed` are the prompter's.
    """

    def __init__(self, task: HeldOut, *, folder: Path, max_characters: int, seed: int) -> None:
        templates = load_templates(folder, task.dataset, task.subset)
        originals = [template for template in templates if template.is_original_task]
        self.task = task
        self.templates = originals[: task.first]
        if not self.templates:
            raise DataError(f"{folder}: no template of an original task for {task.name}")
        self._fields = {template.name: _fields_of(template) for template in self.templates}
        self._prompter = Prompter(max_characters=max_characters, seed=seed)
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
            prompt=id.partition("/")[2],
        )

    def warn_left_out(self) -> None:
        """Log the templates that did not apply to all rows, in one line."""
        if self._left_out:
            left_out = "; ".join(
                f"'{name}' for {count} row(s) without {names}"
                for (name, names), count in sorted(self._left_out.items())
            )
            log.warning("%s: templates left out: %s", self.task.name, left_out)


def _fields_of(template: Template) -> set[str]:
    """Return the fields of a row that a template names."""
    texts = (template.jinja, template.answer_choices or "")
    names = {name for text in texts for name in find_undeclared_variables(SANDBOX.parse(text))}
    return names - {"answer_choices", *SANDBOX.globals}
