"""Packing that was asked for and cannot be: refused in one line, before any weight is read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import BARE, LORA, TOY, make_config, write_rows
from toy_finetunes import toy

from mhr_scale.config import (
    AdaptConfig,
    BackboneConfig,
    EvaluateConfig,
    PlainRunConfig,
    PretrainConfig,
    ScoringConfig,
    ToyTasks,
)
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError, ConfigError
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.pretrain import pretrain

SLOW = replace(BARE, fused_attention=False)
FALCON = BackboneConfig(
    config={
        **{"model_type": "falcon", "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "multi_query": True, "alibi": False},
    },
    dtype="float32",
)
PACKED = ScoringConfig(metric="accuracy", packing=True)


def pretraining(folder: Path, backbone: BackboneConfig) -> PretrainConfig:
    base = load(PretrainConfig, TOY, [f"run.folder={folder}", "tasks.train_examples=3"])
    return replace(base, backbone=backbone, batch=replace(base.batch, packing=True))


def scoring(folder: Path, backbone: BackboneConfig) -> EvaluateConfig:
    tasks = ToyTasks(suite="toy", n_tasks=4, train_examples=3, validation_examples=2)
    run = PlainRunConfig(folder=str(folder))
    return EvaluateConfig(backbone=backbone, tasks=tasks, scoring=PACKED, run=run)


def adapting(folder: Path, backbone: BackboneConfig) -> AdaptConfig:
    rows = write_rows(folder.parent / "rows")
    return make_config(folder, rows, {"LoRA": LORA}, backbone=backbone)


def waves(folder: Path, backbone: BackboneConfig) -> AdaptConfig:
    config = adapting(folder, backbone)
    return replace(config, waves=replace(config.waves, packing=True))


def scored_waves(folder: Path, backbone: BackboneConfig) -> AdaptConfig:
    config = adapting(folder, backbone)
    return replace(config, scoring=replace(config.scoring, packing=True))


VERBS: dict[str, tuple[Any, Any, str]] = {
    "pretrain": (pretrain, pretraining, "batch"),
    "evaluate": (evaluate, scoring, "scoring"),
    "adapt": (adapt, waves, "waves"),
    "adapt, scoring": (adapt, scored_waves, "scoring"),
}
REASONS = {
    "it needs backbone.fused_attention: true": SLOW,
    "attention of a falcon takes padded rows only": FALCON,
}


@pytest.fixture(autouse=True)
def _no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("weights are being read")

    monkeypatch.setattr(Engine, "build", read)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("reason", REASONS)
def test_a_backbone_that_cannot_is_refused_at_the_door(
    tmp_path: Path, verb: str, reason: str
) -> None:
    run, make, part = VERBS[verb]
    with pytest.raises(BackboneError) as refusal:
        run(make(tmp_path / "run", REASONS[reason]))
    message = f"{part}.packing: true, but {reason}; leave it out, or set it to false"
    assert str(refusal.value) == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_one_that_can_goes_on_to_its_weights(tmp_path: Path, verb: str) -> None:
    run, make, _ = VERBS[verb]
    with pytest.raises(AssertionError, match="weights are being read"):
        run(make(tmp_path / "run", BARE))


def test_finetune_runs_stock_attention(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scoring\.packing: true, but finetune runs stock parts"):
        toy(tmp_path / "lora", tmp_path / "run", scoring=PACKED)
