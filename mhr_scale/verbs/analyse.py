"""The verb `analyse`: an adapter in, statistics of what it has learned out.

<run folder>/  analysis.json   routing, inventory, gradient alignment, trained parameters

Statistics of routing and inventory need the adapter alone; alignment needs its backbone and tasks.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.artefact import Card
from mhr_scale.analysis import ANALYSIS, SCHEMA, alignment, clusters
from mhr_scale.analysis.alignment import AlignedTask, Alignment
from mhr_scale.analysis.analysis_table import table
from mhr_scale.analysis.inventory_statistics import describe_inventory
from mhr_scale.analysis.routing_statistics import clustered_order, describe_routing
from mhr_scale.backbone.of_adapter import backbone_of, check_fit, open_adapter
from mhr_scale.config import AlignmentConfig, AnalyseConfig, BatchConfig, PretrainConfig
from mhr_scale.engine.opened import open_backbone
from mhr_scale.errors import AdapterError, ConfigError, did_you_mean
from mhr_scale.jobs.start import source_numbers, variant_numbers
from mhr_scale.recipe.reading import load
from mhr_scale.rows.tokens import TokenSet, open_tokens
from mhr_scale.run import repositories
from mhr_scale.run.files import write_json
from mhr_scale.run.run_folder import RECIPE, RunFolder, owned_folder
from mhr_scale.run.runlog import Progress, log, rank
from mhr_scale.run.streams import write_result
from mhr_scale.tasks.suite import Suite


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentData:
    """The tasks whose gradients are compared, and how their rows are batched and cut."""

    tasks: Suite
    batch: BatchConfig
    token_cache: str | None


def analyse(config: AnalyseConfig) -> Path:
    """Analyse an adapter; returns the folder of `analysis.json`.

    Collective where alignment is measured; otherwise rank 0 works alone.
    """
    with owned_folder(config.run.folder):
        return analyse_adapter(config)


def analyse_adapter(config: AnalyseConfig) -> Path:
    """Analyse an adapter, in a folder that this launch owns."""
    folder = RunFolder(config.run.folder, AnalyseConfig)
    folder.check(config, is_begun=False, holds="an analysis")
    card, adapter = open_adapter(config.adapter, config.backbone_moved_to)
    sources = find_sources(config, adapter)
    if sources is not None:
        align(config, folder, card, adapter, sources)
    elif rank() == 0:
        found = repositories.last_found(config.adapter)
        facts = {"world_size": 1, "placement": "none", "adapter": found.facts}
        rank0_report(config, folder, adapter, None, rows=0, facts=facts)
    return folder.path


def find_sources(config: AnalyseConfig, adapter: Adapter) -> AlignmentData | None:
    """The tasks to measure alignment on; None if it cannot be measured, and the log says why."""
    settings = config.alignment
    if settings is None:
        return None
    try:
        alignment.check_shared(adapter)
    except AdapterError as error:
        log.info("no alignment: %s", error)
        return None
    recipe = read_source_recipe(repositories.last_found(config.adapter).path)
    tasks = config.tasks or (recipe.tasks if recipe else None)
    if tasks is None:
        log.info(
            "no alignment: %s is no pre-training run that says which tasks it was trained on; "
            "give tasks",
            config.adapter,
        )
        return None
    base, cache = BatchConfig(), settings.token_cache
    if recipe is not None and config.tasks is None:  # the tasks are the run's own
        base = recipe.batch
        cache = recipe.run.token_cache if cache is None else cache
    batch = replace(
        base,
        micro_batch_size=settings.micro_batch_size,
        max_input_tokens=settings.max_input_tokens or base.max_input_tokens,
        max_target_tokens=settings.max_target_tokens or base.max_target_tokens,
        cut=settings.cut or base.cut,
    )
    return AlignmentData(tasks=tasks, batch=batch, token_cache=cache)


def read_source_recipe(folder: Path) -> PretrainConfig | None:
    """The recipe of a pre-training run; None if `folder` is not one."""
    try:
        return load(PretrainConfig, folder / RECIPE)
    except ConfigError:
        return None


def align(
    config: AnalyseConfig,
    folder: RunFolder[AnalyseConfig],
    card: Card,
    adapter: Adapter,
    sources: AlignmentData,
) -> None:
    """Place the backbone, measure alignment on it, and report. Collective."""
    settings = config.alignment
    assert settings is not None, "find_sources comes first"
    backbone_config = backbone_of(
        config.adapter,
        card,
        config.backbone_moved_to,
        dtype=config.backbone_dtype,
        quantise=config.backbone_quantise,
    )
    opened = open_backbone(
        backbone_config,
        ds_config=config.run.ds_config,
        timeout_seconds=config.run.timeout_seconds,
        deterministic=config.run.deterministic,
        recipe=config,
        adapter=config.adapter,
    )
    check_fit(config.adapter, card, opened.blueprint)
    opened.check_packing(sources.batch.packing, "batch.packing")
    tokens = open_tokens(
        sources.tasks, opened.tokenizer, sources.batch, opened.family, cache=sources.token_cache
    )
    tasks = choose_tasks(config.adapter, adapter, tokens, settings)
    with opened.placed(adapter.sites) as placed:
        engine = placed.engine
        adapter.bind(placed.adapted)
        source = alignment.GradientSource(
            placed=placed,
            adapter=adapter,
            micro_batch_size=settings.micro_batch_size,
            pad_multiple=sources.batch.pad_multiple,
            is_flat=placed.lays_flat(sources.batch.packing, "batch.packing"),
        )
        progress = Progress(len(tasks), start=0, what="alignment", unit="task")
        measured = alignment.gather_alignment(source, tasks, advance=progress.advance)
        progress.close()
        if engine.rank == 0:
            facts = {
                **engine.facts,
                "adapter": repositories.last_found(config.adapter).facts,
                "backbone": opened.facts,
                "data": {"tokens": tokens.fingerprint},
            }
            rank0_report(config, folder, adapter, measured, rows=settings.rows, facts=facts)
        engine.gather_barrier()


def choose_tasks(
    path: str, adapter: Adapter, tokens: TokenSet, settings: AlignmentConfig
) -> list[AlignedTask]:
    """The sampled tasks with their rows, under their numbers in the adapter.

    Without routing logits all tasks have number 0. Raises `AdapterError` for tasks without a
    routing row and `ConfigError` for fewer than two tasks.
    """
    names = [card.name for card in tokens.cards]
    if len(names) < 2:
        raise ConfigError(f"tasks: alignment compares tasks, and there is only {names}")
    numbers = dict.fromkeys(names, 0)
    if adapter.config.has_logits:
        known = {name: number for number, name in enumerate(adapter.task_names)}
        unknown = [name for name in names if name not in known]
        if unknown:
            hint = did_you_mean(unknown[0], known)
            raise AdapterError(
                f"{path}: has no routing for {len(unknown)} of {len(names)} tasks, such as "
                f"'{unknown[0]}'{hint or '; give the tasks it was trained on'}"
            )
        numbers = {name: known[name] for name in names}
    chosen = alignment.sample_tasks(len(names), settings.tasks, seed=settings.seed)
    return alignment.fixed_rows(tokens, chosen, rows=settings.rows, numbers=numbers)


# -- the report ------------------------------------------------------------------------------------


def rank0_report(
    config: AnalyseConfig,
    folder: RunFolder[AnalyseConfig],
    adapter: Adapter,
    measured: Alignment | None,
    *,
    rows: int,
    facts: dict[str, Any],
) -> None:
    """Write the analysis and print it."""
    analysis = describe(config.adapter, adapter, measured, rows=rows)
    if config.clusters is not None:
        joined = clusters.cluster_tasks(adapter, config.clusters)
        analysis["clusters"] = clusters.by_cluster(adapter.task_names, joined)
    file = folder.path / ANALYSIS
    file.unlink(missing_ok=True)  # an old analysis must not lie beside a new recipe
    folder.keep_recipe(config)
    folder.record_start(**facts)
    write_json(file, analysis)
    blocks = {site.name: site.routing_group("block", 1) for site in adapter.sites}
    log.info("analysis in %s", file)
    write_result(table(analysis, blocks))


def describe(
    path: str, adapter: Adapter, measured: Alignment | None, *, rows: int
) -> dict[str, Any]:
    """The content of `analysis.json`."""
    config = adapter.config
    inventory = describe_inventory(adapter)
    if not any(inventory["norms"]):
        log.info("inventory: every update is zero, as of a fresh adapter: there is no overlap")
    return {
        "schema": SCHEMA,
        "adapter": path,
        "method": config.method,
        "kind": config.kind,
        "policy": config.policy,
        "n_tasks": len(adapter.task_names),
        "n_groups": len(adapter.groups),
        "n_splits": config.n_splits,
        "n_skills": config.n_skills,
        "rank": config.rank,
        "granularity": config.granularity,
        "task_names": list(adapter.task_names),
        "parameters": {
            "multi_task": source_numbers(adapter),
            "variants": variant_numbers(adapter),
        },
        "routing": describe_routing(adapter),
        "inventory": inventory,
        "alignment": describe_alignment(measured, rows=rows),
    }


def describe_alignment(measured: Alignment | None, *, rows: int) -> dict[str, Any] | None:
    """The alignment as plain values; None where no two tasks have a gradient."""
    if measured is None or measured.mean is None:
        return None
    return {
        "tasks": list(measured.tasks),
        "left_out": measured.left_out,
        "rows": rows,
        "mean": measured.mean,
        "order": clustered_order(measured.matrix),
        "matrix": measured.matrix.tolist(),
        "layers": _means(measured.layers),
        "linears": _means(measured.linears),
    }


def _means(means: dict[str, float | None]) -> list[dict[str, Any]]:
    return [{"name": name, "mean": mean} for name, mean in means.items()]
