"""The verb `report` on what the other verbs leave."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import run
from small_runs import SHORT, TOY, make_config, make_source, write_rows

from mhr_scale.config import (
    AverageConfig,
    EvaluateConfig,
    PlainRunConfig,
    PretrainConfig,
    RunConfig,
    ScoringConfig,
    ToyTasks,
    VariantConfig,
)
from mhr_scale.errors import ConfigError, RunError, UserError
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.average import average
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.report import report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run, its averages, their scores and a few-shot run."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setenv("DS_ACCELERATOR", "cpu")
    source = make_source(folder / "mhr", "run.validate_every=2", "run.log_every=1")
    where = RunConfig(folder=str(folder / "mean"), seed=0)
    average(AverageConfig(source=str(source), steps=(0, 2), run=where))
    for k in (0, 2):
        evaluate(
            EvaluateConfig(
                adapter=str(folder / "mean" / "averaged" / f"{k:06d}"),
                tasks=ToyTasks(suite="toy", fold="held_out"),
                scoring=ScoringConfig(metric="exact_match", max_new_tokens=2, examples=2),
                run=PlainRunConfig(folder=str(folder / f"zero_shot_{k}")),
            )
        )
    variants = {
        "MHR": VariantConfig(adapter=str(source)),
        "MHR-z": VariantConfig(adapter=str(source), kind="routing"),
    }
    adapt(make_config(folder / "few_shot", write_rows(folder / "rows"), variants))
    patch.undo()
    return folder


NAMES = ("mhr", "mean", "zero_shot_0", "zero_shot_2", "few_shot")


def test_runs_of_every_verb_are_one_report(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "report.html"
    said = report([*(str(runs / name) for name in NAMES), "--file", str(file)])
    html = file.read_text(encoding="utf-8")
    assert said.startswith(f"{file}  (5 runs, ")
    assert re.findall(r'<section id="([^"]+)"', html) == [
        "summary",
        "few-shot",
        "evaluations",
        "extra-steps",
        "learning",
        "validation-by-task",
        "settings",
        "provenance",
    ]
    assert "unfinished" not in html
    assert "<title>Zero-shot score against extra steps</title>" in html
    assert "MHR-mu" in html


@pytest.mark.parametrize("name", NAMES)
def test_a_run_alone_has_its_report_in_its_folder(runs: Path, name: str) -> None:
    report([str(runs / name), f"--title=About {name}"])
    html = (runs / name / "report.html").read_text(encoding="utf-8")
    assert f"<h1>About {name}</h1>" in html


def test_a_report_changes_nothing_else_in_a_folder(runs: Path) -> None:
    def contents() -> dict[str, bytes]:
        files = (path for path in (runs / "mhr").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files if path.name != "report.html"}

    before = contents()
    report([str(runs / "mhr")])
    assert contents() == before


def test_an_interrupted_run_is_reported_as_unfinished(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    config = load(PretrainConfig, TOY, [*SHORT, f"run.folder={folder}"])
    (runs / "mhr" / "metrics.jsonl").read_text()
    folder.mkdir()
    (folder / "config.yaml").write_bytes((runs / "mhr" / "config.yaml").read_bytes())
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    report([str(folder)])
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert f"unfinished, step 1 of {config.schedule.steps}" in html
    assert "Torn lines left out: cut: 1." in html


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ([], ConfigError, "no run given; usage: mhr_scale report FOLDER"),
        (["--file"], ConfigError, "--file: no value"),
        (["--fiel=x", "a"], ConfigError, "unknown option --fiel; options: .*did you mean"),
        (["nowhere"], RunError, "'nowhere': no such folder"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str],
    kind: type[UserError],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=text):
        report(arguments)


@pytest.mark.parametrize("place", [lambda folder: folder, lambda folder: folder / "file" / "x"])
def test_a_place_that_cannot_be_written_is_told(
    runs: Path, tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--file: "):
        report([str(runs / "few_shot"), f"--file={place(tmp_path)}"])


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    result = run("launch/report.py", str(tmp_path))
    assert result.returncode == 2
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"error: '{tmp_path}': no run; none of config.yaml, ")


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["--help"]).startswith("mhr_scale report FOLDER [FOLDER ...]")
