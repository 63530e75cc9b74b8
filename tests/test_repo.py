"""The repository as a whole: what the README says is so."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, run

from mhr_scale.config import PretrainConfig
from mhr_scale.recipe import load

README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = sorted((ROOT / "mhr_scale").rglob("*.py"))
SHORT = (
    "schedule.steps=2",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "run.save_every=0",
    "batch.max_input_tokens=48",
    "tasks.validation_examples=1",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def tree() -> set[str]:
    """Paths of the files under `mhr_scale/` that the README's tree names."""
    section = README.split("## The tree")[1].split("An arrow")[0]
    found, folders = set(), [""]
    for line in section.splitlines():
        entry = re.match(r"^( +)(\S+)", line)
        if not entry:
            continue
        depth = (len(entry[1]) - 4) // 2
        folders = folders[: depth + 1]
        name = entry[2]
        if name.endswith("/"):
            folders.append(folders[-1] + name)
        else:
            found.add(folders[-1] + name)
    return found


def test_the_tree_in_the_readme_is_the_package() -> None:
    files = {str(path.relative_to(ROOT)) for path in PACKAGE}
    plain = {name for name in files if not name.endswith("/__init__.py")}
    assert {name for name in tree() if name != "mhr_scale/__init__.py"} == plain


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short toy run, for the commands that start from one."""
    folder = tmp_path_factory.mktemp("readme") / "toy"
    result = run("launch/pretrain.py", "launch/recipes/toy.yaml", f"run.folder={folder}", *SHORT)
    assert result.returncode == 0, result.stdout[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_readme_run(
    command: str, tmp_path: Path, toy_run: Path, request: pytest.FixtureRequest
) -> None:
    words = [word for word in shlex.split(command) if "=" not in word or "." in word.split("=")[0]]
    if "../shared" in command:
        folder = request.getfixturevalue("shared")
        words = [word.replace("../shared", str(folder)) for word in words]
    number = next(number for number, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[number], words[number + 1 :]
    ranks = int(words[words.index("--num_gpus") + 1]) if "--num_gpus" in words else 0
    shorter: tuple[str, ...] = SHORT
    if script == "launch/report.py":
        file = tmp_path / "report.html"
        result = run(script, str(toy_run), f"--file={file}")
        assert result.returncode == 0, result.stdout[-3000:]
        assert file.is_file()
        return
    if script == "launch/average.py":
        shorter = (f"source={toy_run}", "steps=[0, 2]")
    if script == "launch/convert.py":
        folder = tmp_path / "backbone"
        result = run(script, *arguments, f"folder={folder}")
        assert result.returncode == 0, result.stdout[-3000:]
        assert (folder / "mhr_scale.json").is_file()
        return
    if script in ("launch/export.py", "launch/finetune.py"):
        recipe, peft = "launch/recipes/toy_export.yaml", tmp_path / "peft"
        result = run("launch/export.py", recipe, f"adapter={toy_run}", f"folder={peft}")
        assert result.returncode == 0, result.stdout[-3000:]
        assert (peft / "adapter_model.safetensors").is_file()
        if script == "launch/export.py":
            return
        shorter = (f"adapter={peft}", "protocol.steps=2", "scoring.examples=1")
    if script == "launch/adapt.py":
        sources = f"variants={{MHR: {{adapter: {toy_run}}}}}"
        shorter = (sources, "protocol.steps=2", "shots.seeds=[0]", "scoring.examples=1")
    if script == "launch/evaluate.py":
        shorter = (f"adapter={toy_run}", "tasks.n_tasks=60", "scoring.examples=1")
    if script == "launch/analyse.py":
        shorter = (f"adapter={toy_run}", "alignment.tasks=2", "alignment.rows=1")
    result = run(script, *arguments, f"run.folder={tmp_path / 'run'}", *shorter, ranks=ranks)
    assert result.returncode == 0, result.stdout[-3000:]
    written = {"launch/data.py": None, "launch/plan.py": None}
    written |= dict.fromkeys(("launch/evaluate.py", "launch/adapt.py"), "summary.json")
    written["launch/analyse.py"] = "analysis.json"
    written["launch/finetune.py"] = "adapter/adapter_model.safetensors"
    expected = written.get(script, "adapter/adapter.safetensors")
    assert expected is None or (tmp_path / "run" / expected).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("code", [code for code in blocks("python") if "mhr_scale import" in code])
def test_the_python_example_of_the_readme_runs(code: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "averaged_adapter" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, flags=re.MULTILINE))
def test_the_make_targets_of_the_readme_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


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


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_under_four_hundred_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize(
    "path", [*PACKAGE, *(ROOT / "launch").rglob("*.py")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_source_is_ascii(path: Path) -> None:
    assert path.read_text(encoding="utf-8").isascii()


@pytest.mark.parametrize("stub", sorted((ROOT / "launch").glob("*.py")), ids=lambda p: p.name)
def test_launch_stubs_have_no_loop_and_at_most_forty_lines(stub: Path) -> None:
    text = stub.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert not re.search(r"^\s*(for|while) ", text, flags=re.MULTILINE)
