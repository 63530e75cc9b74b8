"""The quick study, started as a user does: real units in real processes."""

import json
import shutil
from pathlib import Path

import pytest
from processes import ROOT, run

from mhr_scale.errors import RunError
from reproduction.study import Options, parse, reproduce

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    result = run("launch/reproduce.py", "toy", "--quick", "--folder", str(folder))
    assert result.returncode == 0, result.stdout[-3000:]
    return folder


def options(folder: Path, *words: str) -> Options:
    return parse(["toy", "--quick", "--folder", str(folder), *words], launch=ROOT / "launch")


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_every_number_stands_with_its_seed_and_is_that_of_its_run(study: Path):
    suite = read(study, "results.json")["suites"]["toy"]
    measures = suite["measures"]
    ways = [way for method in suite["methods"] for way in method["ways"]]
    assert ways == ["LoRA", "MHR", "MHR-z", "MHR-mu"]
    wanted = {f"few_shot/{way}" for way in ways} | {"zero_shot/MHR-mu/0", "zero_shot/MHR-mu/2"}
    assert wanted <= set(measures)
    assert all(set(values) == {"1", "2"} for values in measures.values())
    jobs = study.glob("toy/seed2/adapt/none/LoRA/jobs/*/*/*/result.json")
    scores = [json.loads(file.read_text())["score"] for file in jobs]
    assert measures["few_shot/LoRA"]["2"] == pytest.approx(sum(scores) / len(scores))
    alignment = read(study, "toy/seed1/analyse/none/MHR/analysis.json")["alignment"]["mean"]
    assert measures["alignment/none/MHR"]["1"] == alignment
    assert suite["parameters"]["few_shot/LoRA"] == {"multi_task": 6144, "adaptation": 6144}


def test_the_whole_grid_of_rates_is_recorded_beside_the_choice(study: Path):
    rates = read(study, "results.json")["suites"]["toy"]["rates"]
    assert set(rates["chosen"]) == {"LoRA", "MHR"}
    full = [one for one in rates["trials"] if one["family"] == "MHR" and one["way"] == "full"]
    assert len(full) == 2
    assert all(one["score"] is not None for one in rates["trials"])


def test_a_quick_study_says_in_every_file_that_it_tells_nothing(study: Path):
    assert read(study, "results.json")["quick"] is True
    assert read(study, "claims.json")["quick"] is True
    text = (study / "tables.md").read_text()
    assert "Its figures tell nothing" in text
    assert "| LoRA | 6,144 | 6,144 |" in text


def test_claims_without_measures_cannot_be_told(study: Path):
    findings = {one["claim"]["id"]: one for one in read(study, "claims.json")["findings"]}
    assert findings["mhr-big"]["verdict"] == "cannot be told"
    assert findings["mhr-big"]["reason"] == "not measured: few_shot/LoRA-big"
    assert findings["mhr-lora"]["seeds"] == [1, 2]
    assert read(study, "claims.json")["not_run"]


def test_the_same_command_goes_on_and_names_what_fails(study: Path):
    before = read(study, "results.json")["suites"]
    unit = "toy/seed1/evaluate/full/MHR/0"
    (study / "records" / f"{unit}.json").unlink()
    shutil.rmtree(study / unit)
    card = study / "toy/seed1/average/full/MHR/averaged/000000/adapter.json"
    text = card.read_text()
    card.write_text("{")
    failed = run("launch/reproduce.py", "toy", "--quick", "--folder", str(study))
    assert failed.returncode == 2
    assert f"{unit} failed (code 2)" in failed.stdout
    assert "1 of 28 units failed" in failed.stdout
    assert unit in (study / "tables.md").read_text()
    card.write_text(text)
    mended = run("launch/reproduce.py", "toy", "--quick", "--folder", str(study))
    assert mended.returncode == 0, mended.stdout[-3000:]
    assert "19 of 20 units are done already" in mended.stdout
    assert read(study, "results.json")["suites"] == before


def test_a_moved_study_is_another_one(study: Path, tmp_path: Path):
    shutil.copytree(study, tmp_path / "moved", symlinks=True)
    with pytest.raises(RunError, match="other settings"):
        reproduce(options(tmp_path / "moved"))


def test_a_folder_of_another_size_is_refused(study: Path):
    with pytest.raises(RunError, match="use another --folder"):
        reproduce(options(study, "--seeds", "3"))
