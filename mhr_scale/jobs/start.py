"""The adapter that a job starts from, by variant (docs/method.md 7 and 8).

| kind | tensors at the start | trained |
|---|---|---|
| full | the source's inventory, a fresh routing row | both |
| routing (-z) | the same | the routing row |
| average (-mu) | the mean as one adapter, or the inventory under uniform routing | all of it |
| soup | the mean of the pairs of similar tasks | all of it |
| backbone | as full, or fresh | both, and the backbone's weights (`full`) |
| fresh | A random, B zero, a fresh routing row | both |
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.adapters.collapse import average, soup
from mhr_scale.adapters.policies import POLICIES
from mhr_scale.adapters.sites import Site
from mhr_scale.config import AdapterConfig, VariantConfig
from mhr_scale.errors import ConfigError
from mhr_scale.jobs.job import Job

#: The kinds that a paper's table compares.
KINDS: tuple[Literal["full", "routing", "average"], ...] = ("full", "routing", "average")


def check_variant(name: str, variant: VariantConfig, source: Adapter | None) -> None:
    """Raise `ConfigError` if a variant cannot start from its source."""
    if source is None:
        return
    config, place = source.config, f"variants.{name}"
    if variant.kind == "soup":
        if not config.private or config.is_routed:
            raise ConfigError(
                f"{place}.kind: soup averages private adapters, {variant.adapter} is "
                f"{config.method}; pre-train with adapter.private: true and n_skills: 1"
            )
        if variant.soup.adapters > len(source.task_names):
            raise ConfigError(
                f"{place}.soup.adapters: {variant.soup.adapters}, but {variant.adapter} has "
                f"{len(source.task_names)} tasks"
            )
        return
    if config.private and variant.kind != "average":
        raise ConfigError(
            f"{place}.kind: {variant.kind}, but every task of {variant.adapter} has an inventory "
            "of its own; use soup or average"
        )
    if config.private and variant.trainable == "inventory":
        raise ConfigError(f"{place}.trainable: private inventories have a mean only; set mean")
    if variant.kind == "routing" and not config.has_logits:
        raise ConfigError(
            f"{place}.kind: routing, but {variant.adapter} is {config.method} with policy "
            f"'{config.policy}' and has no routing to train"
        )


def config_of(variant: VariantConfig, source: Adapter | None) -> AdapterConfig:
    """Settings of the adapter that a job of this variant trains."""
    if source is None:
        assert variant.fresh is not None
        return replace(variant.fresh, private=False)
    config = source.config
    if variant.kind in ("full", "routing", "backbone"):
        is_frozen = not POLICIES[config.policy].trains_logits
        return replace(config, policy="learned") if is_frozen else config
    if variant.kind == "average" and variant.trainable == "inventory" and config.is_routed:
        return replace(config, policy="uniform")
    return config.single()


def start(
    job: Job,
    variant: VariantConfig,
    source: Adapter | None,
    *,
    sites: Sequence[Site],
    similar: Sequence[str] = (),
) -> Adapter:
    """The adapter that a job starts from; its only task is the job's.

    `similar` names the training tasks that kind soup averages.
    """
    config = config_of(variant, source)
    adapter = Adapter(config, tuple(sites), task_names=[job.task], seed=job.seed)
    if source is None:
        return adapter
    if variant.kind == "soup":
        source = soup(source, similar)
    elif variant.kind == "average" and not (variant.trainable == "inventory" and config.is_routed):
        source = average(source)
    inherited = dict(source.inventory.named_tensors())
    initial = artefact.named_tensors(adapter)
    fresh = {name: initial[name].clone() for name in initial.keys() - inherited.keys()}
    artefact.load_tensors(adapter, {**inherited, **fresh}, place=str(variant.adapter))
    return adapter


def stack(names: Sequence[str], adapters: Sequence[Adapter], *, routing_only: bool) -> Adapter:
    """One adapter whose tasks are jobs, from one adapter per job.

    Each job gets a private inventory, or, under `routing_only`, its own routing row over the one
    frozen inventory that all of them start from.
    """
    first = adapters[0]
    config = replace(first.config, private=not routing_only)
    assert all(adapter.config == first.config for adapter in adapters)
    wave = Adapter(config, first.sites, task_names=names, is_wave=True)
    with torch.no_grad():
        for number, adapter in enumerate(adapters):
            if wave.routing_logits is not None and adapter.routing_logits is not None:
                wave.routing_logits[number].copy_(adapter.routing_logits[0])
            for stacked, parameter in zip(
                wave.inventory.parameters(), adapter.inventory.parameters(), strict=True
            ):
                (stacked if routing_only else stacked[:, number]).copy_(parameter)
    wave.inventory.requires_grad_(not routing_only)
    return wave


@torch.no_grad()
def unstack(wave: Adapter, number: int, task: str) -> Adapter:
    """Extract one job's adapter from a wave, on the host."""
    config = replace(wave.config, private=False)
    adapter = Adapter(config, wave.sites, task_names=[task])
    if adapter.routing_logits is not None and wave.routing_logits is not None:
        adapter.routing_logits[0].copy_(wave.routing_logits[number])
    for parameter, stacked in zip(
        adapter.inventory.parameters(), wave.inventory.parameters(), strict=True
    ):
        parameter.copy_(stacked[:, number] if wave.config.private else stacked)
    return adapter


def source_numbers(source: Adapter) -> int:
    """Numbers of a source's inventory, all tasks together."""
    return sum(parameter.numel() for parameter in source.inventory.parameters())


def variant_numbers(source: Adapter) -> dict[str, int | None]:
    """Numbers that each kind of variant trains per task; None if the source does not support it."""
    counts: dict[str, int | None] = {}
    for kind in KINDS:
        variant = VariantConfig(adapter="the source", kind=kind)
        try:
            check_variant(kind, variant, source)
        except ConfigError:
            counts[kind] = None
            continue
        config = config_of(variant, source)
        counts[kind] = count_trained(config, source.sites, routing_only=kind == "routing")
    return counts


def trained_numbers(wave: Adapter) -> int:
    """Numbers that one job of a wave trains."""
    trained = sum(p.numel() for p in wave.parameters() if p.requires_grad)
    return trained // len(wave.task_names)


def count_trained(config: AdapterConfig, sites: Sequence[Site], *, routing_only: bool) -> int:
    """Numbers that one job of these settings trains, without allocating its tensors."""
    groups = {site.routing_group(config.granularity, config.block_span) for site in sites}
    logits = len(groups) * config.n_splits * config.n_skills if config.has_logits else 0
    if routing_only:
        return logits
    if config.kind == "ia3":
        return logits + config.n_skills * sum(site.out_features for site in sites)
    width = sum(site.in_features + site.out_features for site in sites)
    return logits + config.n_skills * config.rank * width
