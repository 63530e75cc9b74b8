"""The wheel, installed where there is no checkout: its files, and its command."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import ROOT, read_metrics, run

#: Where files of the checkout lie in a wheel.
PLACES = {
    "mhr_scale": "mhr_scale",
    "launch/recipes": "mhr_scale/shipped/launch/recipes",
    "ds_configs": "mhr_scale/shipped/ds_configs",
}
#: A short run of the toy suite, its recipe and its DeepSpeed file by the names that a wheel knows.
SHORT = (
    "run.ds_config=ds_configs/replicated.json",
    "schedule.steps=2",
    "batch={batch_size: 4, micro_batch_size: 2, max_input_tokens: 48, max_target_tokens: 32}",
    "tasks.n_tasks=4",
    "tasks.train_examples=5",
    "tasks.validation_examples=1",
)


def python(*words: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), folder=ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture
def installed(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside which the wheel is installed, and nothing of the checkout is to be found."""
    words = ("install", "-q", "--no-deps", "--no-index", "--no-compile", "--target")
    python("-m", "pip", *words, str(tmp_path / "lib"), str(wheel), folder=tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def test_a_wheel_holds_the_package_its_recipes_and_its_deepspeed_files(wheel: Path) -> None:
    wanted = {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in PLACES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in found if ".dist-info/" in name}
    assert found - about == wanted
    assert "mhr_scale/py.typed" in found
    assert {Path(name).name for name in about} >= {"LICENSE", "METADATA", "entry_points.txt"}


@pytest.mark.slow
@pytest.mark.dist
def test_an_installed_wheel_lists_its_recipes_and_trains_under_the_launcher(
    installed: Path,
) -> None:
    code = "import mhr_scale, os; print(os.path.dirname(mhr_scale.__file__))"
    package = installed.parent / "lib" / "mhr_scale"
    assert python("-c", code, folder=installed).strip() == str(package)
    assert (installed.parent / "lib" / "bin" / "mhr_scale").is_file()
    listed = python("-m", "mhr_scale", "recipes", folder=installed).splitlines()
    assert [line.split()[0] for line in listed] == sorted(
        os.path.splitext(path.relative_to(ROOT / "launch" / "recipes"))[0]
        for path in (ROOT / "launch" / "recipes").rglob("*.yaml")
    )
    result = run("mhr_scale", "pretrain", "toy", *SHORT, ranks=2, folder=installed)
    assert result.returncode == 0, result.stdout
    steps = read_metrics(installed / "runs" / "toy")
    assert [line["step"] for line in steps if "loss" in line][-1] == 2
