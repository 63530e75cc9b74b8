"""Raw rows of data sets of T0 as small files, and their reading under prompt templates."""

import json

from mhr_scale.config import T0Tasks
from mhr_scale.tasks.t0 import mixtures
from mhr_scale.tasks.task import Intake

AG_NEWS = [p.name for p in mixtures.list_prompts("T0") if p.dataset == "ag_news"]
DBERT = [p.name for p in mixtures.list_prompts("T0") if p.dataset == "adversarial_qa_dbert"]
CLASSIFY, BASED_ON = "ag_news_classify", "adversarial_qa_dbert_based_on"

NEWS = [{"text": f"News {n} of the day.", "label": n % 4} for n in range(5)]
QUESTIONS = [
    {
        "id": f"id{n}",
        "title": "Rivers",
        "context": f"River {n} flows north.",
        "question": f"Where does river {n} flow?",
        "answers": {"text": ["north", "to the north"], "answer_start": [14, 14]},
        "metadata": {"split": "train", "model_in_the_loop": "BERT"},
    }
    for n in range(3)
]


def write(folder, data_set, rows):
    path = folder / data_set / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def configure(templates, source, *tasks, **settings):
    return T0Tasks(suite="t0", templates=templates, source=str(source), tasks=tasks, **settings)


def read(templates, source, *tasks, intake=None, **settings):
    settings.setdefault("validation_examples", 0)
    config = configure(templates, source, *tasks, **settings)
    return list(config.read_tasks(Intake() if intake is None else intake))


def write_templates(folder, jinja, choices):
    """Write the templates of ag_news, each of them being the same text."""
    names = [name.removeprefix("ag_news_") for name in AG_NEWS]
    blocks = "".join(
        f"  {name}: !Template\n    answer_choices: {json.dumps(choices)}\n    id: {name}\n"
        f"    jinja: {json.dumps(jinja)}\n    name: {name}\n"
        for name in names
    )
    path = folder / "ag_news" / "templates.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"dataset: ag_news\ntemplates:\n{blocks}")
    return str(folder)
