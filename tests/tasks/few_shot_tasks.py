"""Few-shot tasks: reading them, what holds for those of every suite, and small sources."""

import json

from held_out_files import RTE, RTE_TEMPLATES, configure, write_rows, write_templates

from mhr_scale.config import JsonlTasks, ShotsConfig, SuperNITasks, ToyTasks
from mhr_scale.tasks.suites import read_few_shot

TOY = ToyTasks(suite="toy", fold="held_out", train_examples=40)


def read(config, *, seed=0, examples=None, **shots):
    return read_few_shot(config, ShotsConfig(**shots), seed=seed, examples=examples)[0]


def ids(examples):
    return [example.id for example in examples]


def check_promises(tasks, *, seed):
    """What holds for the tasks of every suite."""
    names = [one.task.name for one in tasks]
    assert len(set(names)) == len(names)
    for one in tasks:
        first, second = one.draw(0), one.draw(1)
        assert one.seed == seed
        assert len(first) == len(second) == one.n_rows > 0
        assert one.draw(0) == first
        assert [row.place for row in first] == [row.place for row in second]
        assert one.task.test
        drawn = {row.id for row in (*first, *second)}
        assert drawn <= set(ids(one.task.train))


def write_superni(folder, *, count=20, fold="test"):
    rows = [{"id": f"i{n}", "input": f"x{n}", "output": [f"y{n}", f"z{n}"]} for n in range(count)]
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    content = {"Definition": ["Add"], "Positive Examples": [], "Instances": rows}
    (folder / "tasks" / "t.json").write_text(json.dumps(content))
    (folder / "splits" / "default" / f"{fold}_tasks.txt").write_text("t\n")
    return SuperNITasks(suite="superni", folder=str(folder), fold=fold, test_examples=5)


def write_jsonl(folder, **folds):
    for fold, count in folds.items():
        rows = ({"input": f"{fold} {number}", "target": "y"} for number in range(count))
        write_rows(folder / "t" / f"{fold}.jsonl", *rows)
    return JsonlTasks(suite="jsonl", folder=str(folder), validation_examples=4)


def write_rte(folder, *, train=40, templates=RTE_TEMPLATES, shots=None, **options):
    """Evaluation rows, and either a train split or a file of shots (then of seed 0)."""
    write_templates(folder, "super_glue", "rte", *templates)
    rows = [{**RTE, "premise": f"p{idx}", "idx": idx} for idx in range(train)]
    write_rows(folder / "rte.validation.jsonl", *({**row, "premise": "eval"} for row in rows[:9]))
    if shots:
        write_rows(folder / "shots" / "rte" / f"{shots}_shot" / "0_seed.jsonl", *rows[:shots])
    else:
        write_rows(folder / "rte.train.jsonl", *rows)
    return configure(folder, tasks=("rte",), **options)
