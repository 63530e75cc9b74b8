"""The verbs over a backbone in 8 and 4 bits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT
from torch import Tensor

from mhr_scale.adapters.artefact import read_card
from mhr_scale.backbone.of_adapter import backbone_of
from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    BackboneConfig,
    EvaluateConfig,
    PlainRunConfig,
    PretrainConfig,
    ProtocolConfig,
    ScoringConfig,
    SelectionConfig,
    ShotsConfig,
    ToyTasks,
    VariantConfig,
)
from mhr_scale.errors import ConfigError, EngineError
from mhr_scale.recipe.reading import load
from mhr_scale.scores import summary
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.pretrain import pretrain

KINDS = ("int8", "nf4")
TASKS = ToyTasks(suite="toy", n_tasks=4, train_examples=20, validation_examples=10)
RECIPE = str(ROOT / "launch" / "recipes" / "toy.yaml")
SHORT = (
    "schedule.steps=12",
    "batch.batch_size=16",
    "batch.micro_batch_size=16",
    "tasks.n_tasks=4",
    "tasks.train_examples=20",
    "tasks.validation_examples=10",
    "run.log_every=1",
)


def test_a_sharded_placement_is_refused_with_the_way_out(tmp_path: Path) -> None:
    overrides = ("backbone.quantise=nf4", "run.ds_config=ds_configs/cpu.json")
    config = load(PretrainConfig, RECIPE, [*SHORT, *overrides, f"run.folder={tmp_path / 'run'}"])
    with pytest.raises(EngineError, match=r"ds_configs/cpu.json shards them; leave run.ds_config"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def test_a_bare_backbone_says_itself_how_it_is_quantised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set backbone.quantise"):
        EvaluateConfig(
            backbone=BackboneConfig(name="builtin:toy"),
            backbone_quantise="nf4",
            tasks=TASKS,
            run=PlainRunConfig(folder=str(tmp_path)),
        )


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short toy run over a quantised backbone."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    overrides = (f"backbone.quantise={request.param}", f"run.folder={folder}")
    pretrain(load(PretrainConfig, RECIPE, [*SHORT, *overrides]))
    return folder


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_pretraining_lowers_the_loss_on_held_out_rows(run: Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    found = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert found[-1] < 0.8 * found[0]


def test_the_card_says_how_the_backbone_was_quantised(run: Path) -> None:
    card = read_card(run)
    assert card.backbone["quantise"] == run.name
    assert backbone_of(str(run), card, None).quantise == run.name


def test_a_card_that_does_not_say_so_means_whole_weights(run: Path) -> None:
    card = read_card(run)
    facts = {name: value for name, value in card.backbone.items() if name != "quantise"}
    assert backbone_of(str(run), replace(card, backbone=facts), None).quantise == "none"


def scores(folder: Path) -> Tensor:
    return torch.tensor([s["choice_scores"] for s in summary.read_scores(folder / "scores.jsonl")])


def test_an_adapter_is_evaluated_on_the_backbone_it_was_trained_on_or_another(
    run: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(
        adapter=str(run),
        tasks=TASKS,
        scoring=ScoringConfig(metric="accuracy"),
        run=PlainRunConfig(folder=str(tmp_path / "own")),
    )
    own = scores(evaluate(config))
    whole = replace(
        config, backbone_quantise="none", run=PlainRunConfig(folder=str(tmp_path / "whole"))
    )
    other = scores(evaluate(whole))
    assert own.isfinite().all()
    assert 1e-5 < (own - other).norm() / other.norm() < 0.5


def few_shot(run: Path, folder: Path, **changes: Any) -> AdaptConfig:
    config = AdaptConfig(
        variants={
            "MHR": VariantConfig(adapter=str(run)),
            "mean": VariantConfig(adapter=str(run), kind="average"),
        },
        tasks=ToyTasks(suite="toy", fold="held_out"),
        shots=ShotsConfig(seeds=(0,), count=8),
        protocol=ProtocolConfig(
            steps=8, loss="language_model", max_input_tokens=32, max_target_tokens=32
        ),
        selection=SelectionConfig(on="last"),
        scoring=ScoringConfig(metric="accuracy", examples=2),
        run=AdaptRunConfig(folder=str(folder), log_every=1),
    )
    return replace(config, **changes)


def test_few_shot_jobs_train_over_a_quantised_backbone(run: Path, tmp_path: Path) -> None:
    folder = adapt(few_shot(run, tmp_path / "jobs"))
    results = list(folder.glob("jobs/*/*/*/result.json"))
    assert len(results) == 20
    for file in results:
        losses = [line["loss"] for line in read_lines(file.with_name("metrics.jsonl"))]
        assert losses[-1] < losses[0]


def test_weights_in_few_bits_are_not_fine_tuned(run: Path, tmp_path: Path) -> None:
    variants = {"full": VariantConfig(adapter=str(run), kind="backbone")}
    config = few_shot(run, tmp_path / "jobs", variants=variants)
    with pytest.raises(ConfigError, match=r"set backbone_quantise: none for all variants"):
        adapt(config)
