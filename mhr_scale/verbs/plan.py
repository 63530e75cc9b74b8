"""The verb `plan`: what a recipe would take on some machines, and which placement to use."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhr_scale.config import AdaptConfig, EvaluateConfig, PlanConfig, PretrainConfig
from mhr_scale.errors import ConfigError
from mhr_scale.planning.hardware import find_machines
from mhr_scale.recipe.reading import (
    check_recipe_given,
    load,
    load_settings,
    read_names,
    split_words,
)
from mhr_scale.recipe.settings import help_text

USAGE = (
    "mhr_scale plan RECIPE [hardware.x=value ...] [workload.x=value ...] [a.b=value ...] "
    "[--json] [--format text|markdown|csv|latex]"
)
#: Settings of the plan itself; every other one overrides the recipe.
PLAN_SETTINGS = ("hardware.", "workload.")
#: The recipes that can be planned, by verb.
SCHEMAS: dict[str, type[Any]] = {
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "adapt": AdaptConfig,
}


def plan(arguments: Sequence[str]) -> str:
    """The plan for a recipe of `pretrain`, `evaluate` or `adapt`, as a table or as JSON.

    Settings under `hardware` and `workload` are the plan's, all others override the recipe. No
    weight and no row is read. Raises `ConfigError`, and what opening the recipe's adapter raises.
    """
    options, words = split_words(arguments, "--json")
    if "--help" in options:
        return f"{USAGE}\n\n{help_text(PlanConfig)}"
    check_recipe_given(words, usage=USAGE)
    recipe, *overrides = words
    plan_words = [word for word in overrides if word.startswith(PLAN_SETTINGS)]
    settings = load_settings(PlanConfig, plan_words)
    kind = recognise(recipe)
    config = load(SCHEMAS[kind], recipe, [word for word in overrides if word not in plan_words])

    machines = find_machines(settings.hardware)

    from mhr_scale.planning.kinds import PLANNERS  # needs torch
    from mhr_scale.planning.plan_table import as_json, as_text

    estimates = PLANNERS[kind](config, settings.workload, machines)
    if "--json" in options:
        return json.dumps(as_json(estimates), indent=1) + "\n"
    return as_text(estimates)


def recognise(recipe: Path | str) -> str:
    """Which verb a recipe is for, by its parts; raises `ConfigError` if `plan` does not know it."""
    names = read_names(recipe)
    if "variants" in names:
        return "adapt"
    if "schedule" in names and "adapter" in names:
        return "pretrain"
    if "tasks" in names and ("adapter" in names or "backbone" in names) and "task" not in names:
        return "evaluate"
    raise ConfigError(
        f"{recipe}: sets {', '.join(names) or 'nothing'}; plan reads recipes of pretrain, evaluate "
        "and adapt"
    )
