"""Pre-training loss of LoRA, Poly and MHR on the toy suite, several seeds each.

python launch/tools/toy_methods.py [a.b=value ...]

Runs launch/recipes/toy.yaml once per method and seed into runs/toy_methods/ and prints, per method,
the training loss over the last 100 steps and the held-out loss, mean and standard deviation over
seeds. About half a minute a run on one CPU core; runs that are there already are not repeated.
"""

import json
import statistics
import sys
from pathlib import Path

from mhr_scale.config import PretrainConfig
from mhr_scale.recipe import load
from mhr_scale.runlog import start_logging
from mhr_scale.verbs.pretrain import pretrain

RECIPE = Path(__file__).parent.parent / "recipes" / "toy.yaml"
FOLDER = Path("runs/toy_methods")
SEEDS = (0, 1, 2)
METHODS = {
    "LoRA": ("adapter.n_skills=1", "adapter.n_splits=1"),
    "Poly": ("adapter.n_splits=1",),
    "MHR": (),
}


def losses(folder: Path) -> tuple[float, float]:
    """Training loss over the last 100 steps, and the last held-out loss, of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line["loss"] for line in lines if "loss" in line][-10:]
    return statistics.mean(training), lines[-1]["validation_loss"]


def main() -> None:
    """Run every method on every seed and print the table."""
    start_logging()
    rows = []
    for method, overrides in METHODS.items():
        found = []
        for seed in SEEDS:
            folder = FOLDER / f"{method}_{seed}"
            settings = [*overrides, f"run.folder={folder}", f"run.seed={seed}", *sys.argv[1:]]
            pretrain(load(PretrainConfig, RECIPE, settings))
            found.append(losses(folder))
        rows.append((method, *zip(*found, strict=True)))
    print(f"\n{'method':8} {'training loss':>18} {'held-out loss':>18}   ({len(SEEDS)} seeds)")
    for method, training, held_out in rows:
        cells = [
            f"{statistics.mean(v):.3f} +- {statistics.stdev(v):.3f}" for v in (training, held_out)
        ]
        print(f"{method:8} {cells[0]:>18} {cells[1]:>18}")


if __name__ == "__main__":
    main()
