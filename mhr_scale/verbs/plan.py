"""The verb `plan`: what a recipe would take on some machines, and which placement to use."""

import json
from collections.abc import Sequence
from pathlib import Path

from mhr_scale.config import PlanConfig
from mhr_scale.errors import ConfigError
from mhr_scale.planning.hardware import find_machines
from mhr_scale.planning.kinds import PLANNERS, recognise
from mhr_scale.planning.table import as_json, as_text
from mhr_scale.recipe import help_text, load, load_settings, read_names

USAGE = "python launch/plan.py RECIPE [hardware.x=value ...] [workload.x=value ...] [a.b=value ...]"
#: Parts that are the plan's own; every other setting is the recipe's.
OWN = ("hardware.", "workload.")
FLAGS = ("--json", "--help", "-h")


def plan(arguments: Sequence[str]) -> str:
    """The plan for a recipe of `pretrain`, `evaluate` or `adapt`, as a table or as JSON.

    Settings under `hardware` and `workload` are the plan's, all others override the recipe. No
    weight and no row is read. Raises `ConfigError` and what opening the recipe's parts raises.
    """
    words = [word for word in arguments if not word.startswith("--local_rank")]
    flags = [word for word in words if word.startswith("-")]
    unknown = sorted(set(flags) - set(FLAGS))
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]}; options: --json, --help")
    if set(flags) & {"--help", "-h"}:
        return f"{USAGE} [--json]\n\n{help_text(PlanConfig)}"
    words = [word for word in words if word not in flags]
    if not words or ("=" in words[0] and not Path(words[0]).exists()):
        raise ConfigError(f"no recipe given; usage: {USAGE}")
    recipe, overrides = Path(words[0]), words[1:]
    own = [word for word in overrides if word.startswith(OWN)]
    asked = load_settings(PlanConfig, own)
    kind = recognise(read_names(recipe))
    schema, planner = PLANNERS[kind]
    config = load(schema, recipe, [word for word in overrides if word not in own])
    found = planner(config, asked.workload, find_machines(asked.hardware))
    if "--json" in flags:
        return json.dumps(as_json(found), indent=1) + "\n"
    return as_text(found)
