"""`finetune` means by its settings what `adapt` means, and computes the same."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from toy_finetunes import TASK, losses, toy

from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    OptimConfig,
    SelectionConfig,
    ShotsConfig,
    VariantConfig,
)
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.finetune import finetune

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize(
    ("loss", "optimizer"), [("language_model", "adafactor"), ("t_few", "adamw")]
)
def test_a_job_of_adapt_has_the_same_losses(
    exported: Path, tmp_path: Path, loss: str, optimizer: str
) -> None:
    given = toy(exported, tmp_path / "finetune")
    protocol = replace(given.protocol, steps=6, loss=loss)  # type: ignore[type-var]
    settings: dict[str, Any] = {"name": optimizer, "lr": 5e-3, "scale_parameter": True}
    optim = FinetuneOptimConfig(**settings)
    config = replace(given, protocol=protocol, optim=optim, micro_batch_size=3)
    finetune(config)
    adapt(
        AdaptConfig(
            variants={"LoRA": VariantConfig(adapter=str(exported))},
            tasks=config.tasks,
            shots=ShotsConfig(seeds=(0,), count=16),
            backbone_dtype="float32",
            protocol=protocol,
            optim=OptimConfig(**settings),
            selection=SelectionConfig(on="last"),
            scoring=config.scoring,
            run=AdaptRunConfig(folder=str(tmp_path / "adapt"), log_every=1),
        )
    )
    assert losses(tmp_path / "finetune") == pytest.approx(
        losses(tmp_path / "adapt" / "jobs" / TASK / "0" / "LoRA"), rel=2e-4
    )


def test_the_settings_that_adapt_has_too_mean_the_same_by_default() -> None:
    ours, theirs = FinetuneOptimConfig(), OptimConfig()
    shared = {field.name for field in fields(ours)} & {field.name for field in fields(theirs)}
    assert {field.name for field in fields(ours)} == shared
    assert {n: getattr(ours, n) for n in shared} == {n: getattr(theirs, n) for n in shared}
    left_out = [
        next(field for field in fields(kind) if field.name == "optim").default_factory()
        for kind in (FinetuneConfig, AdaptConfig)
    ]
    assert {n: getattr(left_out[0], n) for n in shared} == {
        n: getattr(left_out[1], n) for n in shared
    }


def test_a_rate_in_a_recipe_trains_as_much_as_in_a_recipe_of_adapt(
    exported: Path, tmp_path: Path
) -> None:
    """The first losses of both, from recipes with the same text under `optim`."""
    text = "optim={name: adafactor, lr: 0.05}"
    few = ["protocol.steps=4", "protocol.warmup_fraction=0.0", "protocol.decay=constant"]
    recipes = ROOT / "launch" / "recipes"
    folder = tmp_path / "finetune"
    given = [f"adapter={exported}", f"run.folder={folder}", "run.log_every=1", "shots.seed=0"]
    finetune(load(FinetuneConfig, recipes / "toy_finetune.yaml", [*given, *few, text]))
    job = load(
        AdaptConfig,
        recipes / "toy_adapt.yaml",
        [
            f"variants={{LoRA: {{adapter: {exported}}}}}",
            "tasks={suite: toy, fold: held_out, instruction: none}",
            "shots={seeds: [0], count: 32}",
            "selection={on: last}",
            "scoring={metric: exact_match, max_new_tokens: 2, examples: 1}",
            "backbone_dtype=float32",
            f"run.folder={tmp_path / 'adapt'}",
            "run.log_every=1",
            *few,
            text,
        ],
    )
    adapt(replace(job, tasks=job.tasks.only(TASK)))
    expected = losses(tmp_path / "adapt" / "jobs" / TASK / "0" / "LoRA")
    assert losses(folder) == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < 0.9 * expected[0]
