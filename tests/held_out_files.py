"""Templates and raw rows of held-out tasks, as small files."""

import json

from mhr_scale.config import HeldOutTasks
from mhr_scale.tasks.task import Intake

RTE = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1, "idx": 7}


def template(name, jinja, choices="Yes ||| No", original=True):
    return f"""
  {name}: !Template
    answer_choices: {json.dumps(choices)}
    id: {name}
    jinja: {json.dumps(jinja)}
    metadata: !TemplateMetadata
      metrics: [Accuracy]
      original_task: {str(original).lower()}
    name: {name}
    reference: ''"""


RTE_TEMPLATES = (
    template("b", "{{premise}} So {{hypothesis}}? ||| {{answer_choices[label]}}"),
    template("a", "{{hypothesis}} ||| {{answer_choices[label]}}"),
    template("c", "{{premise}} ||| {{hypothesis}}", original=False),
)


def write_templates(folder, dataset, subset, *templates):
    folder = folder / "templates" / dataset / (subset or "")
    folder.mkdir(parents=True, exist_ok=True)
    head = f"dataset: {dataset}\n" + (f"subset: {subset}\n" if subset else "") + "templates:"
    (folder / "templates.yaml").write_text(head + "".join(templates) + "\n")


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def configure(place, **options):
    options = {"folder": str(place), "templates": str(place / "templates"), **options}
    return HeldOutTasks(suite="t0_eval", **options)


def read_rte(folder, *rows, templates=RTE_TEMPLATES, intake=None, **options):
    write_templates(folder, "super_glue", "rte", *templates)
    if rows:
        write_rows(folder / "rte.validation.jsonl", *rows)
    (task,) = configure(folder, tasks=("rte",), **options).read_tasks(intake or Intake())
    return task
