"""Results belong to what they were made from: other content under the same names is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_runs import SHORT, TOY, make_config, make_source, write_rows
from toy_finetunes import export_lora, toy

from mhr_scale.adapters import artefact
from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.config import (
    AnalyseConfig,
    AverageConfig,
    BackboneConfig,
    EvaluateConfig,
    JsonlTasks,
    PlainRunConfig,
    PretrainConfig,
    RunConfig,
    ScoringConfig,
    VariantConfig,
)
from mhr_scale.errors import RunError
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.analyse import analyse
from mhr_scale.verbs.average import average
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.finetune import finetune
from mhr_scale.verbs.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("on_cpu")
ROW = "rotate_right.plus4.before/test.jsonl"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, rows, a source run over them, and a finished run of every verb that resumes."""
    place = tmp_path_factory.mktemp("stale")
    shutil.copytree(BUILTIN["builtin:toy"], place / "backbone")
    write_rows(place / "rows")
    make_source(place / "source", f"backbone.name={place / 'backbone'}")
    export_lora(place / "lora")
    for verb in VERBS:
        VERBS[verb](place)
    return place


@pytest.fixture
def place(made: Path) -> Iterator[Path]:
    """All of it, put back after the test: recipes name it by its path."""
    kept = made.with_name("kept")
    shutil.copytree(made, kept)
    yield made
    shutil.rmtree(made)
    kept.rename(made)


def run_pretrain(place: Path) -> Path:
    rows = f"{{suite: jsonl, folder: {place / 'rows'}}}"
    own = [word for word in SHORT if not word.startswith("tasks.")]
    words = [*own, f"tasks={rows}", f"backbone.name={place / 'backbone'}"]
    return pretrain(load(PretrainConfig, TOY, [*words, f"run.folder={place / 'pretrain'}"]))


def run_evaluate(place: Path) -> Path:
    return evaluate(
        EvaluateConfig(
            adapter=str(place / "source"),
            routing="average",
            tasks=JsonlTasks(suite="jsonl", folder=str(place / "rows")),
            scoring=ScoringConfig(metric="accuracy"),
            run=PlainRunConfig(folder=str(place / "evaluate")),
        )
    )


def run_adapt(place: Path) -> Path:
    variants = {"MHR": VariantConfig(adapter=str(place / "source"))}
    return adapt(make_config(place / "adapt", place / "rows", variants))


def run_average(place: Path) -> Path:
    run = RunConfig(folder=str(place / "average"))
    return average(AverageConfig(source=str(place / "source"), run=run))


def run_finetune(place: Path) -> Path:
    backbone = BackboneConfig(name=str(place / "backbone"), dtype="float32")
    return finetune(toy(place / "lora", place / "finetune", backbone=backbone))


VERBS: dict[str, Callable[[Path], Path]] = {
    "pretrain": run_pretrain,
    "evaluate": run_evaluate,
    "adapt": run_adapt,
    "average": run_average,
    "finetune": run_finetune,
}
HOLDS = {"evaluate": "scores", "adapt": "jobs", "average": "averages"}


def other_adapter(place: Path) -> None:
    make_other = load_file(place / "source" / "adapter" / artefact.TENSORS)
    card, adapter = artefact.read(place / "source")
    artefact.load_tensors(adapter, {n: t + 0.01 for n, t in make_other.items()}, place="here")
    artefact.save(adapter, place / "source" / "adapter", backbone=card.backbone)
    file = place / "lora" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)


def other_row(place: Path, fold: str = "test") -> None:
    file = place / "rows" / "rotate_right.plus4.before" / f"{fold}.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    row = json.loads(first)
    file.write_text(json.dumps({**row, "input": row["input"] + " b"}) + "\n" + "".join(rest))


def other_backbone(place: Path) -> None:
    file = place / "backbone" / "model.safetensors"
    tensors = load_file(file)
    tensors["shared.weight"] = tensors["shared.weight"].clone()
    tensors["shared.weight"][-1] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})


CHANGES: list[tuple[str, Callable[[Path], None], str]] = [
    *((verb, other_adapter, "adapter ") for verb in ("evaluate", "adapt", "finetune")),
    ("average", other_adapter, "source was "),
    *((verb, other_row, "rows of rotate_right.plus4.before") for verb in ("evaluate", "adapt")),
    (
        "pretrain",
        lambda place: other_row(place, "train"),
        "rows of rotate_right.plus4.before was ",
    ),
    *((verb, other_backbone, "backbone was ") for verb in ("pretrain", "evaluate", "adapt")),
    ("finetune", other_backbone, "backbone was "),
]


@pytest.mark.parametrize(("verb", "change", "name"), CHANGES)
def test_other_content_under_the_same_name_is_refused(
    place: Path, verb: str, change: Callable[[Path], None], name: str
) -> None:
    before = {path: path.read_bytes() for path in (place / verb).rglob("*") if path.is_file()}
    change(place)
    with pytest.raises(RunError) as caught:
        VERBS[verb](place)
    text = str(caught.value)
    holds = HOLDS.get(verb, "a run")
    assert text.startswith(f"{place / verb}: holds {holds} made from other content ({name}")
    assert text.endswith("use another run.folder, or put back what it was made from")
    assert {p: p.read_bytes() for p in (place / verb).rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_content_goes_on(place: Path, verb: str) -> None:
    before = (place / verb / "inputs.json").read_bytes()
    VERBS[verb](place)
    assert (place / verb / "inputs.json").read_bytes() == before
    assert not list((place / verb).glob(".lock"))


def test_half_done_scores_are_not_completed_with_another_adapter(place: Path) -> None:
    scores = place / "evaluate" / "scores.jsonl"
    scores.write_bytes(b"".join(scores.read_bytes().splitlines(keepends=True)[:3]))
    other_adapter(place)
    with pytest.raises(RunError, match="made from other content"):
        run_evaluate(place)
    assert len(scores.read_bytes().splitlines()) == 3


def test_a_changed_recipe_of_an_average_is_refused(place: Path) -> None:
    run = RunConfig(folder=str(place / "average"))
    with pytest.raises(RunError, match="holds averages of other settings"):
        average(AverageConfig(source=str(place / "pretrain"), run=run))


def test_a_run_of_an_earlier_version_goes_on_with_a_word(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhr_scale.run.runlog.log.propagate", True)
    (place / "evaluate" / "inputs.json").unlink()
    run_evaluate(place)
    assert "an earlier version, which did not write down what it read" in caplog.text
    assert (place / "evaluate" / "inputs.json").exists()


# -- folders of something else ---------------------------------------------------------------------

FOREIGN = {
    "a backbone": ["config.json", "model.safetensors"],
    "a PEFT folder": ["adapter_config.json", "adapter_model.safetensors"],
    "somebody's numbers": ["metrics.jsonl"],
    "an adapter": ["adapter/adapter.json"],
    "a run without its recipe": ["provenance.json", "steps/000004/DONE"],
}


def run_analyse(place: Path) -> Path:
    run = PlainRunConfig(folder=str(place / "analyse"))
    return analyse(AnalyseConfig(adapter=str(place / "source"), alignment=None, run=run))


@pytest.mark.parametrize("verb", [*VERBS, "analyse"])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_of_something_else_is_refused_untouched(
    made: Path, tmp_path: Path, verb: str, what: str
) -> None:
    for name in ("backbone", "rows", "source", "lora"):
        (tmp_path / name).symlink_to(made / name)
    for name in FOREIGN[what]:
        (tmp_path / verb / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / verb / name).write_text("mine")
    with pytest.raises(RunError) as caught:
        {**VERBS, "analyse": run_analyse}[verb](tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / verb}: holds ")
    assert "it is the folder of something else; use another run.folder" in str(caught.value)
    files = [path for path in (tmp_path / verb).rglob("*") if path.is_file()]
    assert {path.read_text() for path in files} == {"mine"}


def test_logs_and_notes_in_a_new_folder_are_left_alone(made: Path, tmp_path: Path) -> None:
    for name in ("backbone", "rows", "source", "lora"):
        (tmp_path / name).symlink_to(made / name)
    notes = ("train.log", "slurm-7.out", "notes.md", ".hidden")
    (tmp_path / "average").mkdir()
    for name in notes:
        (tmp_path / "average" / name).write_text("mine")
    run_average(tmp_path)
    assert {(tmp_path / "average" / name).read_text() for name in notes} == {"mine"}
