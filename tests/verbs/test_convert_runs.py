"""Every verb that opens a converted backbone compares it with its fingerprint once."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_runs import LORA, SHORT, TASKS, TOY, make_source, write_rows

from mhr_scale.backbone.manifest import MANIFEST
from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    AverageConfig,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    FinetuneRunConfig,
    FinetuneShotsConfig,
    JsonlTasks,
    OriginConfig,
    PlainRunConfig,
    PretrainConfig,
    ProtocolConfig,
    RunConfig,
    ScoringConfig,
    SelectionConfig,
    ShotsConfig,
    ToyTasks,
)
from mhr_scale.config.model import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.average import average
from mhr_scale.verbs.convert import convert
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.export import export
from mhr_scale.verbs.finetune import finetune
from mhr_scale.verbs.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("on_cpu")

ONE_STEP = ProtocolConfig(steps=1)
SCORING = ScoringConfig(examples=1)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A converted backbone, a run over it and that run's average in PEFT's format."""
    place = tmp_path_factory.mktemp("places")
    origin = OriginConfig(name="builtin:toy")
    folder = convert(ConvertConfig(backbone=origin, folder=str(place / "backbone")))
    run = make_source(place / "run", f"backbone.name={folder}")
    exported = export(ExportConfig(adapter=str(run), folder=str(place / "peft")))
    rows = write_rows(place / "rows")
    return {"backbone": folder, "run": run, "peft": exported, "rows": rows}


def to_pretrain(places: dict[str, Path], out: Path) -> None:
    name = f"backbone.name={places['backbone']}"
    pretrain(load(PretrainConfig, TOY, [*SHORT, "schedule.steps=1", name, f"run.folder={out}"]))


def to_average(places: dict[str, Path], out: Path) -> None:
    average(AverageConfig(source=str(places["run"]), steps=(1,), run=RunConfig(folder=str(out))))


def to_evaluate(places: dict[str, Path], out: Path) -> None:
    tasks = ToyTasks(suite="toy", n_tasks=1, train_examples=1, validation_examples=1)
    config = EvaluateConfig(
        backbone=BackboneConfig(name=str(places["backbone"])),
        tasks=tasks,
        scoring=SCORING,
        run=PlainRunConfig(folder=str(out)),
    )
    evaluate(config)


def to_adapt(places: dict[str, Path], out: Path) -> None:
    config = AdaptConfig(
        variants={"lora": LORA},
        backbone=BackboneConfig(name=str(places["backbone"]), dtype="float32"),
        tasks=JsonlTasks(suite="jsonl", folder=str(places["rows"])),
        shots=ShotsConfig(seeds=(0,), count=4),
        protocol=ONE_STEP,
        selection=SelectionConfig(on="last"),
        scoring=SCORING,
        run=AdaptRunConfig(folder=str(out)),
    )
    adapt(config)


def to_finetune(places: dict[str, Path], out: Path) -> None:
    config = FinetuneConfig(
        adapter=str(places["peft"]),
        backbone=BackboneConfig(name=str(places["backbone"])),
        tasks=JsonlTasks(suite="jsonl", folder=str(places["rows"])),
        task=TASKS[0],
        shots=FinetuneShotsConfig(count=4),
        protocol=ONE_STEP,
        scoring=SCORING,
        run=FinetuneRunConfig(folder=str(out)),
    )
    finetune(config)


VERBS = [to_pretrain, to_average, to_evaluate, to_adapt, to_finetune]
Verb = Callable[[dict[str, Path], Path], None]


@pytest.fixture
def spoilt(places: dict[str, Path]) -> Iterator[None]:
    """Stored logits of another backbone, for the length of a test."""
    file = places["backbone"] / MANIFEST
    text = file.read_text()
    manifest = json.loads(text)
    print_ = manifest["fingerprint"]
    print_["logits"] = [[row[::-1] for row in rows] for rows in print_["logits"]]
    file.write_text(json.dumps(manifest))
    yield
    file.write_text(text)


@pytest.mark.parametrize("verb", VERBS)
def test_the_right_backbone_passes(
    verb: Verb, places: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mhr_scale")
    verb(places, tmp_path / "out")
    assert caplog.text.count("backbone: its stored logits to") == 1


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_one_stops_the_verb(verb: Verb, places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="does not give the logits it was stored with"):
        verb(places, tmp_path / "out")
    assert not list((tmp_path / "out").glob("**/adapter.safetensors"))
