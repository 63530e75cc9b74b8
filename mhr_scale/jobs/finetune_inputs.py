"""The inputs of a fine-tuning, read and validated before any weight is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhr_scale.adapters import artefact
from mhr_scale.adapters.artefact import Card
from mhr_scale.backbone import quantise
from mhr_scale.backbone.blueprint import Blueprint, read_blueprint
from mhr_scale.backbone.of_adapter import check_fit
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    BackboneConfig,
    FinetuneConfig,
    SelectionConfig,
    ShotsConfig,
    VariantConfig,
)
from mhr_scale.engine.opened import inputs_of
from mhr_scale.errors import AdapterError, ConfigError, suggest
from mhr_scale.exchange import stock
from mhr_scale.families.family import Family
from mhr_scale.jobs.job_data import JobData, open_data
from mhr_scale.run import repositories
from mhr_scale.tasks.suites import read_few_shot
from mhr_scale.tasks.task import Intake


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneInputs:
    """What is read and checked before any weight of the backbone is loaded."""

    source: Path
    card: Card
    backbone: BackboneConfig
    blueprint: Blueprint
    tokenizer: Any
    data: JobData
    intake: Intake
    contents: dict[str, str]
    """What the run reads, by content (`RunFolder.check_inputs`)."""


def open_inputs(config: FinetuneConfig) -> FinetuneInputs:
    """Read and check the adapter, the backbone's configuration and the task."""
    named = repositories.joined(config.backbone.name or "", config.backbone.revision) or None
    source, card, adapter = stock.open_lora(config.adapter, named)
    backbone = find_backbone(config, card)
    blueprint = read_blueprint(backbone)
    quantise.check(backbone, blueprint)
    check_fit(config.adapter, card, blueprint)
    tokenizer = load_tokenizer(backbone, blueprint)
    data, intake = read_data(config, tokenizer, blueprint.family)
    return FinetuneInputs(
        source=source,
        card=card,
        backbone=backbone,
        blueprint=blueprint,
        tokenizer=tokenizer,
        data=data,
        intake=intake,
        contents={
            **inputs_of(blueprint, tokenizer),
            **repositories.commits(config.adapter),
            f"adapter {repositories.name_of(config.adapter)}": artefact.digest(adapter),
            f"rows of {config.task}": data.digest,
        },
    )


def find_backbone(config: FinetuneConfig, card: Card) -> BackboneConfig:
    """The recipe's backbone, or the one that the adapter's folder names, run as the recipe says.

    Raises `AdapterError` if neither names one.
    """
    if config.backbone.name is not None:
        return config.backbone
    named = card.backbone.get("name")
    if named is None:
        raise AdapterError(
            f"{config.adapter}: names no backbone (base_model_name_or_path); set backbone.name"
        )
    revision = config.backbone.revision or card.backbone.get("revision")
    return replace(config.backbone, name=named, revision=revision)


def read_data(config: FinetuneConfig, tokenizer: Any, family: Family) -> tuple[JobData, Intake]:
    """The rows of the task; raises `ConfigError` if the suite has no such task."""
    tasks = config.tasks.only(config.task)
    shots, seed = config.shots, config.shots.seed
    adaptation = AdaptConfig(
        variants={"finetune": VariantConfig(adapter=config.adapter)},
        tasks=tasks,
        shots=ShotsConfig(seeds=(seed,), count=shots.count, folder=shots.folder),
        protocol=config.protocol,
        selection=SelectionConfig(on="last"),
        scoring=config.scoring,
        run=AdaptRunConfig(folder=config.run.folder),
    )
    examples = config.scoring.examples
    few_shot_tasks, intake = read_few_shot(tasks, adaptation.shots, seed=seed, examples=examples)
    by_name = {few_shot.task.name: few_shot for few_shot in few_shot_tasks}
    if config.task not in by_name:
        hint = suggest(config.task, by_name)
        raise ConfigError(f"task: suite {tasks.suite} has no task '{config.task}'{hint}")
    return open_data(by_name[config.task], adaptation, tokenizer, family), intake
