"""The verbs over a folder whose linears are stored in 8 and 4 bits."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversions import run_convert
from processes import ROOT
from torch import Tensor
from toy_finetunes import export_lora, losses, toy

from mhr_scale.adapters import artefact
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.weights import read_whole
from mhr_scale.config import (
    BackboneConfig,
    EvaluateConfig,
    ExportConfig,
    PlainRunConfig,
    PretrainConfig,
    ScoringConfig,
    ToyTasks,
)
from mhr_scale.errors import ConfigError, EngineError
from mhr_scale.jobs.full import check_backbone_jobs
from mhr_scale.recipe.reading import load
from mhr_scale.scores import summary
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.export import export
from mhr_scale.verbs.finetune import finetune
from mhr_scale.verbs.pretrain import pretrain

RECIPE = str(ROOT / "launch" / "recipes" / "toy.yaml")
TASKS = ToyTasks(suite="toy", n_tasks=4, train_examples=20, validation_examples=10)
SHORT = (
    "schedule.steps=6",
    "batch.batch_size=16",
    "batch.micro_batch_size=16",
    "tasks.n_tasks=4",
    "tasks.train_examples=20",
    "tasks.validation_examples=10",
    "adapter.n_splits=1",
    "adapter.n_skills=1",
    "run.log_every=1",
)


@pytest.fixture(scope="module", params=["int8", "nf4"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy backbone, whole and quantised, and a run over either."""
    place = tmp_path_factory.mktemp(request.param) / request.param
    run_convert("builtin:toy", place / "whole")
    run_convert("builtin:toy", place / "stored", quantise=request.param)
    for name in ("whole", "stored"):
        pretrain(recipe(place, name, place / f"run_{name}"))
    return place


def recipe(place: Path, name: str, folder: Path, *more: str) -> PretrainConfig:
    asked = (f"backbone.name={place / name}", "backbone.dtype=bfloat16", f"run.folder={folder}")
    kind = (f"backbone.quantise={place.name}",) if name == "whole" else ()
    return load(PretrainConfig, RECIPE, [*SHORT, *asked, *kind, *more])


def scores(folder: Path) -> Tensor:
    return torch.tensor([s["choice_scores"] for s in summary.read_scores(folder / "scores.jsonl")])


def test_a_run_over_the_folder_trains_the_same_adapter(place: Path) -> None:
    one, other = (
        artefact.named_tensors(artefact.load(place / f"run_{name}")) for name in ("whole", "stored")
    )
    assert len(one) > 10
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_card_says_the_kind_that_the_folder_holds(place: Path) -> None:
    card = artefact.read_card(place / "run_stored")
    assert card.backbone["quantise"] == place.name
    assert card.backbone["name"] == str(place / "stored")


def test_an_adapter_moves_between_the_folders(place: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        adapter=str(place / "run_stored"),
        tasks=TASKS,
        scoring=ScoringConfig(metric="accuracy"),
        run=PlainRunConfig(folder=str(tmp_path / "stored")),
    )
    moved = replace(
        config,
        backbone_moved_to=str(place / "whole"),
        run=PlainRunConfig(folder=str(tmp_path / "whole")),
    )
    assert torch.equal(scores(evaluate(config)), scores(evaluate(moved)))


def test_a_merged_export_holds_what_the_parts_stand_for(place: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        adapter=str(place / "run_stored"), folder=str(tmp_path / "merged"), format="merged"
    )
    export(config)  # with its check of the logits
    merged = read_blueprint(BackboneConfig(name=str(tmp_path / "merged")))
    source = read_blueprint(BackboneConfig(name=str(place / "stored"))).source
    assert merged.quantise == "none"
    assert merged.source.names() == source.names()
    name = "shared.weight"
    assert torch.equal(read_whole(merged.source, name), read_whole(source, name).to(torch.bfloat16))


def test_finetune_starts_from_the_folder(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mhr_scale")
    lora = export_lora(tmp_path / "lora")
    for name, kind in (("whole", place.name), ("stored", "none")):
        backbone = BackboneConfig(name=str(place / name), quantise=kind)  # type: ignore[arg-type]
        finetune(toy(lora, tmp_path / name, backbone=backbone))
        assert f"({place.name} and bfloat16, " in caplog.text
        caplog.clear()
    assert losses(tmp_path / "stored") == losses(tmp_path / "whole")


def test_shards_are_refused(place: Path, tmp_path: Path) -> None:
    config = recipe(place, "stored", tmp_path / "run", "run.ds_config=ds_configs/cpu.json")
    with pytest.raises(EngineError, match=r"cpu.json shards them; .* name a folder of whole"):
        pretrain(config)


def test_jobs_that_train_the_weights_are_refused(place: Path) -> None:
    config = BackboneConfig(name=str(place / "stored"), dtype="float32")
    opened: Any = SimpleNamespace(ds_content={}, config=config, blueprint=read_blueprint(config))
    asked: Any = SimpleNamespace(backbone_variants=["f"])
    with pytest.raises(ConfigError, match=rf"holds {place.name} ones; name a folder of whole"):
        check_backbone_jobs(asked, opened)
