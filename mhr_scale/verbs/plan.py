"""The verb `plan`: what a recipe would take on some machines, and which placement to use."""

import json
from collections.abc import Sequence

from mhr_scale.config import PlanConfig
from mhr_scale.planning.hardware import find_machines
from mhr_scale.planning.kinds import PLANNERS, recognise
from mhr_scale.planning.plan_table import as_json, as_text
from mhr_scale.recipe.reading import check_recipe_given, help_text, load, load_settings, split_words

USAGE = (
    "python launch/plan.py RECIPE [hardware.x=value ...] [workload.x=value ...] [a.b=value ...] "
    "[--json] [--format text|markdown|csv|latex]"
)
#: Settings of the plan itself; every other one overrides the recipe.
PLAN_SETTINGS = ("hardware.", "workload.")


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
    schema, planner = PLANNERS[recognise(recipe)]
    config = load(schema, recipe, [word for word in overrides if word not in plan_words])
    estimates = planner(config, settings.workload, find_machines(settings.hardware))
    if "--json" in options:
        return json.dumps(as_json(estimates), indent=1) + "\n"
    return as_text(estimates)
