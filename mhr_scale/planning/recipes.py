"""Backbone, adapters and tasks of a recipe whose source adapters may not exist yet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter
from mhr_scale.backbone.of_adapter import backbone_of, open_adapter, open_library
from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    BackboneConfig,
    EvaluateConfig,
    PretrainConfig,
    WorkloadConfig,
)
from mhr_scale.errors import ConfigError, UserError
from mhr_scale.jobs.adapt_inputs import one_backbone
from mhr_scale.jobs.start import config_of
from mhr_scale.recipe.reading import load
from mhr_scale.tasks.crossfit.partitions import open_partition
from mhr_scale.tasks.t0.mixtures import list_prompts

#: Rows of the routing table if neither recipe nor command line says how many.
UNKNOWN_TASKS = 300


def n_tasks(config: PretrainConfig, workload: WorkloadConfig) -> tuple[int, str]:
    """Rows of the routing table, and the source of that number."""
    tasks: Any = config.tasks
    if workload.tasks is not None:
        return workload.tasks, "workload.tasks"
    if tasks.suite == "toy":
        return tasks.n_tasks, "the recipe's"
    if tasks.suite == "t0":
        prompts = list_prompts(tasks.mixture)
        units = {prompt.name if tasks.unit == "prompt" else prompt.dataset for prompt in prompts}
        return len(units), "T0's own table"
    if tasks.suite == "crossfit":
        partition = open_partition(tasks.partition)
        return len(tasks.tasks or partition.tasks(tasks.fold)), partition.source
    if tasks.suite == "superni":
        listed = Path(tasks.folder) / "splits" / tasks.split / f"{tasks.fold}_tasks.txt"
        if listed.is_file():
            lines = listed.read_text(encoding="utf-8").splitlines()
            return sum(bool(line.strip()) for line in lines), str(listed)
    return UNKNOWN_TASKS, "assumed: set workload.tasks"


def _source(workload: WorkloadConfig, error: UserError) -> PretrainConfig:
    if workload.source is None:
        raise ConfigError(
            f"{error}; to plan before it exists, name its recipe: workload.source=RECIPE"
        ) from error
    return load(PretrainConfig, workload.source)


def subject(
    config: EvaluateConfig, workload: WorkloadConfig
) -> tuple[BackboneConfig, AdapterConfig | None]:
    """Backbone and adapter settings of an evaluation; without adapter the latter are None.

    LoRAs that tokens choose among are counted as one of all their columns.
    """
    if config.adapter is None:
        assert config.backbone is not None
        return config.backbone, None
    is_library, n_experts = config.routing == "arrow", 1
    try:
        opening = open_library if is_library else open_adapter
        card, stored = opening(config.adapter, config.backbone_moved_to)
        frozen = backbone_of(config.adapter, card, config.backbone_moved_to)
        settings = stored.config
        n_experts = len(stored.task_names) if settings.private else settings.n_skills
    except UserError as error:
        source = _source(workload, error)
        frozen, settings = source.backbone, source.adapter
        n_experts = n_tasks(source, workload)[0] if settings.private else settings.n_skills
    frozen = replace(
        frozen,
        dtype=config.backbone_dtype or frozen.dtype,
        quantise=config.backbone_quantise or frozen.quantise,
    )
    if config.routing == "average":
        settings = replace(settings, n_skills=1, n_splits=1, policy="learned", private=False)
    if is_library:
        settings = replace(settings.single(), rank=settings.rank * n_experts)
    return frozen, None if config.routing == "off" else settings


def variants(
    config: AdaptConfig, workload: WorkloadConfig
) -> tuple[BackboneConfig, dict[str, AdapterConfig]]:
    """The backbone of all variants, and the adapter settings of each variant's jobs."""
    cards, sources = {}, {}
    paths = dict.fromkeys(v.adapter for v in config.variants.values() if v.adapter is not None)
    planned: PretrainConfig | None = None
    for path in paths:
        try:
            cards[path], sources[path] = open_adapter(path, config.backbone_moved_to)
        except UserError as error:
            planned = _source(workload, error)
    if planned is not None and not cards:
        frozen = config.backbone or replace(planned.backbone, dropout=0.0, recompute="none")
    else:
        frozen = one_backbone(config, cards)
    settings = {}
    for name, variant in config.variants.items():
        if name in config.backbone_variants:
            continue
        source = sources.get(variant.adapter or "")
        if source is None and variant.adapter is not None:
            assert planned is not None
            source = Adapter(planned.adapter, (), task_names=["planned"])
        settings[name] = config_of(variant, source)
    if not settings:
        raise ConfigError(
            "variants: all of kind backbone, which share no pass and have no placement but "
            "replicated float32"
        )
    return frozen, settings
