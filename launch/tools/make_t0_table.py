"""Write `mhr_scale/tasks/t0/t0_mixture.json`: the data sets, sizes and prompts of T0's mixtures.

    git clone --branch v0.2.3 https://github.com/bigscience-workshop/promptsource
    git clone https://github.com/bigscience-workshop/t-zero
    git -C t-zero checkout 87a699e3
    python launch/tools/make_t0_table.py promptsource/promptsource/templates t-zero/t0/datasets.csv

Both sources are licensed under Apache-2.0. Taken from them are facts alone: which data sets T0 was
trained on and their sizes (t-zero), and the names of their templates (promptsource).
"""

import argparse
import csv
import json
from pathlib import Path

from mhr_scale.tasks.t0 import mixtures
from mhr_scale.tasks.t0.prompts import load_templates

SOURCE = (
    "promptsource v0.2.3, template files (github.com/bigscience-workshop/promptsource, "
    "Apache-2.0); t-zero 87a699e3, t0/datasets.csv (github.com/bigscience-workshop/t-zero, "
    "Apache-2.0); written by launch/tools/make_t0_table.py"
)
LEVELS = {"BASE": "T0", "GPT_EVAL": "T0+", "SGLUE": "T0++"}


def main() -> None:
    """Read both sources and write the table, a data set a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("templates", type=Path, help="promptsource's folder of templates")
    parser.add_argument("sizes", type=Path, help="t-zero's datasets.csv")
    parser.add_argument("--out", type=Path, default=mixtures.TABLE, help="default: %(default)s")
    args = parser.parse_args()
    entries = make_entries(args.templates, args.sizes)
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    text = f'{{\n "source": {json.dumps(SOURCE)},\n "datasets": [\n  {lines}\n ]\n}}\n'
    args.out.write_text(text, encoding="ascii")
    n_prompts = sum(len(entry["templates"]) for entry in entries)
    print(f"{len(entries)} data sets, {n_prompts} prompts in {args.out}")


def make_entries(templates: Path, sizes: Path) -> list[dict]:
    """Return one entry per data set that any of the mixtures trains on, sorted by name."""
    entries = []
    with sizes.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["do_train"]:
                dataset, subset = row["HF_name"], row["subset"] or None
                entries.append(
                    {
                        "dataset": dataset,
                        "subset": subset,
                        "mixture": LEVELS[row["do_train"]],
                        "train_size": int(row["train_size"]),
                        "templates": [t.name for t in load_templates(templates, dataset, subset)],
                    }
                )
    return sorted(entries, key=lambda entry: (entry["dataset"], entry["subset"] or ""))


if __name__ == "__main__":
    main()
