"""The repository as a whole: what holds of every file, and of any start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, run

from mhr_scale.config import PretrainConfig
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.command import VERBS


@pytest.mark.slow
@pytest.mark.dist
def test_a_printed_recipe_is_a_recipe(tmp_path: Path) -> None:
    """Whatever DeepSpeed says when it is imported, as it is for a sharded backbone."""
    path, printed = ROOT / "launch" / "recipes" / "t0_11b_p3_mhr8.yaml", tmp_path / "printed.yaml"
    command = [sys.executable, "launch/pretrain.py", str(path), "--print"]
    environment = {name: text for name, text in os.environ.items() if name != "DS_ACCELERATOR"}
    with printed.open("w") as file:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, check=True, timeout=300)
    assert load(PretrainConfig, printed) == load(PretrainConfig, path)


def test_a_mistake_under_the_launcher_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    result = run(
        "launch/pretrain.py",
        "launch/recipes/toy.yaml",
        "adapter.rnk=2",
        f"run.folder={tmp_path / 'run'}",
        ranks=2,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert (result.returncode, len(lines)) == (2, 1)
    assert "did you mean 'rank'?" in lines[0]
    assert not (tmp_path / "run").exists()


def test_launch_stubs_are_verbs_of_the_command_and_nothing_else() -> None:
    stubs = {stub.stem: stub.read_text() for stub in (ROOT / "launch").glob("*.py")}
    assert set(stubs) - {"reproduce"} == set(VERBS) - {"recipes"}
    same = {text.replace(name, "VERB") for name, text in stubs.items() if name != "reproduce"}
    assert len(same) == 1


def test_launch_stubs_have_no_loop_and_at_most_forty_lines() -> None:
    for stub in sorted((ROOT / "launch").glob("*.py")):
        text = stub.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40, stub
        assert not re.search(r"^\s*(for|while) ", text, flags=re.MULTILINE), stub
