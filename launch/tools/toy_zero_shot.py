"""Zero-shot accuracy on the toy suite's held-out tasks after k extra steps, with instruction.

python launch/tools/toy_zero_shot.py [a.b=value ...]

For LoRA, Poly and MHR and each seed: pre-train launch/recipes/toy.yaml with `instruction: full`,
average with k = 0, 200 and 600 extra steps (LoRA is given the same steps), generate answers for the
10 held-out tasks and print exact match, mean and standard deviation over seeds. Runs go into
runs/toy_zero_shot/; runs that are there already are not repeated. About ten minutes on one core.
"""

import json
import statistics
import sys
from pathlib import Path

from mhr_scale.config import (
    AverageConfig,
    EvaluateConfig,
    PretrainConfig,
    RunConfig,
    ScoringConfig,
    ToyTasks,
)
from mhr_scale.recipe import load
from mhr_scale.runlog import start_logging
from mhr_scale.verbs.average import average
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.pretrain import pretrain

RECIPE = Path(__file__).parent.parent / "recipes" / "toy.yaml"
FOLDER = Path("runs/toy_zero_shot")
SEEDS = (0, 1, 2)
STEPS = (0, 200, 600)
METHODS = {
    "LoRA": ("adapter.n_skills=1", "adapter.n_splits=1"),
    "Poly-mu": ("adapter.n_splits=1",),
    "MHR-mu": (),
}


def exact_match(method: str, seed: int) -> list[float]:
    """Exact match after each number of extra steps, for one method and seed."""
    run, mean = FOLDER / f"{method}_{seed}", FOLDER / f"{method}_{seed}_average"
    settings = [*METHODS[method], "tasks.instruction=full", f"run.folder={run}"]
    pretrain(load(PretrainConfig, RECIPE, [*settings, f"run.seed={seed}", *sys.argv[1:]]))
    average(AverageConfig(source=str(run), steps=STEPS, run=RunConfig(folder=str(mean), seed=seed)))
    found = []
    for steps in STEPS:
        folder = evaluate(
            EvaluateConfig(
                adapter=str(mean / "averaged" / f"{steps:06d}"),
                tasks=ToyTasks(suite="toy", fold="held_out", instruction="full"),
                scoring=ScoringConfig(metric="exact_match", max_new_tokens=10),
                run=RunConfig(folder=str(FOLDER / f"{method}_{seed}_{steps}")),
            )
        )
        found.append(json.loads((folder / "summary.json").read_text())["mean_over_tasks"])
    return found


def main() -> None:
    """Run every method on every seed and print the table."""
    start_logging()
    rows = {method: [exact_match(method, seed) for seed in SEEDS] for method in METHODS}
    print(f"\n{'method':8}" + "".join(f"{f'k = {steps}':>18}" for steps in STEPS))
    for method, seeds in rows.items():
        columns = list(zip(*seeds, strict=True))
        cells = [f"{statistics.mean(c):.1f} +- {statistics.stdev(c):.1f}" for c in columns]
        print(f"{method:8}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
