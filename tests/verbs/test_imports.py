"""What is imported before it is needed: nothing heavy for help, a printed recipe or a mistake."""

import json
import subprocess
import sys

import pytest
from processes import ROOT

HEAVY = {
    *("torch", "deepspeed", "transformers", "scipy", "matplotlib", "datasets", "peft", "pyarrow"),
    *("bitsandbytes", "safetensors.torch"),
}
#: Runs a script with several command lines; prints exit codes and what is imported then.
PROGRAMME = """
import json, runpy, sys
codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = words
    start = runpy.run_path if words[0].endswith(".py") else runpy.run_module
    try:
        start(words[0], run_name="__main__")
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps([codes, sorted(sys.modules)]))
"""
RECIPES = {
    "pretrain": ["toy.yaml", "toy.yaml run.ds_config=zero3"],
    "data": ["toy.yaml"],
    "average": ["toy_average.yaml"],
    "evaluate": ["toy_evaluate.yaml"],
    "adapt": ["toy_adapt.yaml"],
    "analyse": ["toy_analyse.yaml"],
    "export": ["toy_export.yaml"],
    "finetune": ["toy_finetune.yaml"],
    "convert": ["t0_11b_convert.yaml"],
}


def launch(commands: list[str]) -> tuple[list[int], set[str]]:
    """Exit codes of command lines in one process, and all that it imported."""
    words = [command.split() for command in commands]
    command = [sys.executable, "-c", PROGRAMME, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    return codes, set(modules)


@pytest.mark.parametrize("verb", RECIPES)
def test_help_a_printed_recipe_and_a_mistake_in_it_need_nothing_heavy(verb: str) -> None:
    recipes = [f"launch/recipes/{recipe}" for recipe in RECIPES[verb]]
    commands = [
        "--help",
        "--schema",
        *(f"{recipe} --print" for recipe in recipes),
        f"{recipes[0]} nothing=1",
        "nowhere.yaml",
    ]
    codes, modules = launch([f"launch/{verb}.py {command}" for command in commands])
    assert codes == [0, 0, *(0 for _ in recipes), 2, 2]
    assert not modules & HEAVY


def test_plan_finds_mistakes_before_it_counts() -> None:
    recipe = "launch/recipes/toy.yaml"
    mistakes = ["optim.lrr=1", "hardware.gpu_s=8", "workload.choices=0", "hardware.gpu=A100-40GB"]
    commands = ["--help", *(f"{recipe} {mistake}" for mistake in mistakes), "nowhere.yaml"]
    codes, modules = launch([f"mhr_scale plan {command}" for command in commands])
    assert codes == [0, 2, 2, 2, 2, 2]
    assert not modules & HEAVY


def test_tables_and_reports_of_what_is_no_run_need_nothing_heavy() -> None:
    commands = ["summarise --help", "summarise nowhere", "report --help", "report docs"]
    codes, modules = launch([f"mhr_scale {command}" for command in commands])
    assert codes == [0, 2, 0, 2]
    assert not modules & HEAVY


def test_the_command_by_itself_needs_nothing_heavy_and_no_verb() -> None:
    commands = ["--help", "recipes", "recipes toy", "", "pretrian", "recipes nowhere"]
    codes, modules = launch([f"mhr_scale {command}" for command in commands])
    assert codes == [0, 0, 0, 2, 2, 2]
    verbs = {name for name in modules if name.startswith("mhr_scale.verbs.")}
    assert verbs == {f"mhr_scale.verbs.{name}" for name in ("command", "launching", "recipes")}
    assert not modules & {*HEAVY, "numpy", "pydantic", "mhr_scale.config"}


def test_names_of_the_package_are_imported_when_they_are_used() -> None:
    programme = (
        "import sys, mhr_scale.config, mhr_scale\n"
        "assert 'torch' not in sys.modules\n"
        "for name in mhr_scale.__all__ + mhr_scale.adapters.__all__: assert name in (dir(mhr_scale)"
        " + dir(mhr_scale.adapters))\n"
        "from mhr_scale import attach, load_adapter\n"
        "from mhr_scale.adapters import find_sites, methods\n"
        "assert attach is methods.attach and 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", programme], cwd=ROOT, check=True, timeout=120)


def test_no_module_imports_at_its_door_what_only_some_of_its_uses_need() -> None:
    programme = (
        "import importlib, pkgutil, sys, mhr_scale\n"
        # a program, and kinds of other libraries' own classes
        "apart = {'mhr_scale.__main__', 'mhr_scale.exchange.harness',"
        " 'mhr_scale.exchange.routed_trainer'}\n"
        "for found in pkgutil.walk_packages(mhr_scale.__path__, 'mhr_scale.'):\n"
        "    if found.name not in apart: importlib.import_module(found.name)\n"
        "later = {'deepspeed', 'datasets', 'peft', 'bitsandbytes', 'evaluate', 'sentencepiece',"
        " 'accelerate', 'rouge_score', 'tensorboard', 'wandb', 'trackio', 'mlflow',"
        " 'lm_eval'}\n"
        "assert 'mhr_scale.verbs.pretrain' in sys.modules\n"
        "assert not later & set(sys.modules), later & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", programme], cwd=ROOT, check=True, timeout=240)
