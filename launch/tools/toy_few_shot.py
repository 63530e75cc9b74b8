"""Few-shot exact match of eight methods on the toy suite's held-out tasks, without instruction.

python launch/tools/toy_few_shot.py [a.b=value ...]

For each seed: pre-train launch/recipes/toy.yaml as LoRA, with random masks, as Poly and as MHR,
then adapt each to the 10 held-out tasks with 32 shots as launch/recipes/toy_adapt.yaml says
(arguments change that recipe). Runs go into runs/toy_methods/ and runs/toy_few_shot/; what is there
already is not repeated. About ten minutes on one core.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mhr_scale.comparison import compare, table
from mhr_scale.config import AdaptConfig, PretrainConfig, VariantConfig
from mhr_scale.jobs.job import read_all_results
from mhr_scale.recipe import load
from mhr_scale.runlog import start_logging
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.pretrain import pretrain

RECIPES = Path(__file__).parent.parent / "recipes"
SOURCES, FOLDER = Path("runs/toy_methods"), Path("runs/toy_few_shot")
SEEDS = (0, 1, 2)
Kind = Literal["full", "routing", "average"]
METHODS = {
    "LoRA": ("adapter.n_skills=1", "adapter.n_splits=1"),
    "Random": ("adapter.n_splits=1", "adapter.policy=random"),
    "Poly": ("adapter.n_splits=1",),
    "MHR": (),
}
#: Columns of the table: what each starts from, and how it is adapted.
VARIANTS: dict[str, tuple[str, Kind]] = {
    "LoRA": ("LoRA", "full"),
    "Random-mu": ("Random", "average"),
    "Poly-mu": ("Poly", "average"),
    "MHR-mu": ("MHR", "average"),
    "Poly-z": ("Poly", "routing"),
    "MHR-z": ("MHR", "routing"),
    "Poly": ("Poly", "full"),
    "MHR": ("MHR", "full"),
}


def pretrained(method: str, seed: int) -> str:
    """The run of a method and seed, trained if it is not there yet."""
    folder = str(SOURCES / f"{method}_{seed}")
    settings = [*METHODS[method], f"run.folder={folder}", f"run.seed={seed}"]
    pretrain(load(PretrainConfig, RECIPES / "toy.yaml", settings))
    return folder


def main() -> None:
    """Pre-train, adapt, and print the table over all seeds."""
    start_logging()
    results = []
    for seed in SEEDS:
        sources = {method: pretrained(method, seed) for method in METHODS}
        recipe = load(AdaptConfig, RECIPES / "toy_adapt.yaml", sys.argv[1:])
        variants = {
            name: VariantConfig(adapter=sources[method], kind=kind)
            for name, (method, kind) in VARIANTS.items()
        }
        folder = adapt(
            replace(
                recipe,
                variants=variants,
                shots=replace(recipe.shots, seeds=(seed,)),
                run=replace(recipe.run, folder=str(FOLDER / str(seed))),
            )
        )
        results += read_all_results(folder)
    print("\n" + table(compare(results)))


if __name__ == "__main__":
    main()
