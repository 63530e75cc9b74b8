"""Write `mhr_scale/tasks/crossfit/crossfit.json`: CrossFit's tasks, metrics and partitions.

    git clone https://github.com/INK-USC/CrossFit
    python launch/tools/make_crossfit_table.py CrossFit

Taken are facts alone: the names of the tasks, which metric each has, and which tasks a partition
trains on, selects on and tests on.
"""

import argparse
import ast
import json
from pathlib import Path
from typing import Any

from mhr_scale.tasks.crossfit import partitions

SOURCE = (
    "dataloader/metrics.py and dataloader/custom_tasks_splits of github.com/INK-USC/CrossFit; "
    "written by launch/tools/make_crossfit_table.py"
)
#: The partitions of the paper, by the names of their files.
FILES = {
    "random": "default",
    **{
        name: name
        for name in (
            "train_classification_test_classification",
            "train_halfhalf_test_classification",
            "train_non_mrc_qa_test_mrc",
            "train_non_multiple_choice_qa_test_multiple_choice",
            "train_non_nli_test_nli",
            "train_nonclassification_test_classification",
            "train_nonparaphrase_classification_test_paraphrase",
        )
    },
}


def main() -> None:
    """Read a checkout and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of CrossFit")
    parser.add_argument("--out", type=Path, default=partitions.TABLE, help="default: %(default)s")
    args = parser.parse_args()
    table = make_table(args.checkout / "dataloader")
    write_table(table, args.out)
    print(f"{len(table['metrics'])} tasks, {len(table['partitions'])} partitions in {args.out}")


def make_table(folder: Path) -> dict[str, Any]:
    """The metric of every task and the task lists of every partition."""
    module = ast.parse((folder / "metrics.py").read_text(encoding="utf-8"))
    (metrics,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METRICS"
    )
    files = {
        name: json.loads((folder / "custom_tasks_splits" / f"{file}.json").read_text("utf-8"))
        for name, file in FILES.items()
    }
    lists = {
        name: {fold: file[fold] for fold in ("train", "dev", "test")}
        for name, file in files.items()
    }
    return {"source": SOURCE, "metrics": metrics, "partitions": lists}


def write_table(table: dict[str, Any], path: Path) -> None:
    """Write a table, a partition's fold a line."""
    parts = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(fold)}: {json.dumps(tasks)}" for fold, tasks in lists.items())
        + "\n  }"
        for name, lists in table["partitions"].items()
    ]
    metrics = ",\n".join(
        f"  {json.dumps(task)}: {json.dumps(metric)}" for task, metric in table["metrics"].items()
    )
    text = (
        f'{{\n "source": {json.dumps(table["source"])},\n "metrics": {{\n{metrics}\n }},\n'
        f' "partitions": {{\n' + ",\n".join(parts) + "\n }\n}\n"
    )
    path.write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
