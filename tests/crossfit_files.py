"""Hand-made folders in CrossFit's format."""

import json

from mhr_scale.config import CrossFitTasks

#: Two tasks to train on and two to test, one of several outputs and one of numbers.
LISTS = {"train": ["boolq", "imdb"], "dev": ["app_reviews"], "test": ["glue-cola", "freebase_qa"]}
SEEDS = (13, 21)


def write_task(folder, name, *, k=4, seeds=SEEDS, test=3, rows=None):
    """The files of a task: rows of a seed are told apart by their texts, test rows are not."""
    (folder / name).mkdir(parents=True)
    for seed in seeds:
        for fold, count in (("train", k), ("dev", k), ("test", test)):
            mark = "test" if fold == "test" else f"{seed} {fold}"
            made = rows or [(f"{mark} {n}", *outputs(name, n)) for n in range(count)]
            text = "".join("\t".join(row) + "\n" for row in made)
            (folder / name / f"{name}_{k}_{seed}_{fold}.tsv").write_text(text, encoding="utf-8")


def outputs(name, number):
    """What is right for a row of a task."""
    made = {
        "glue-cola": ("acceptable" if number % 2 else "unacceptable",),
        "app_reviews": (str(number % 5),),
        "freebase_qa": (f"answer {number}", f"the {number}"),
    }
    return made.get(name, ("yes" if number % 2 else "no",))


def write_crossfit(folder, **changes):
    """All tasks of the lists, the lists themselves, and the suite that reads them."""
    for name in {name for names in LISTS.values() for name in names}:
        write_task(folder / "data", name)
    (folder / "partition.json").write_text(json.dumps(LISTS))
    return CrossFitTasks(
        suite="crossfit",
        folder=str(folder / "data"),
        partition=str(folder / "partition.json"),
        **{"seeds": SEEDS, **changes},
    )
