"""Opening a training run: everything that is checked at the door, then its parts put together.

What the verbs that train share: the backbone, the adapter, the tokens and the sample stream of a
recipe, and the run folder.
"""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from mhr_scale import backbone, checkpoint, fingerprint, quantise, tracking, typed
from mhr_scale.adapters import Adapter, attach, find_sites
from mhr_scale.adapters.layout import check_splits
from mhr_scale.adapters.state import Card, check_backbone, load_tensors, named_tensors
from mhr_scale.analysis.monitor import check_tasks, make_monitor
from mhr_scale.backbone import Blueprint
from mhr_scale.batching import StepBatches
from mhr_scale.config import AdapterConfig, BackboneConfig, PretrainConfig
from mhr_scale.engine import Engine, deepspeed_config, is_sharded, read_ds_config
from mhr_scale.errors import AdapterError, BackboneError, ConfigError, RunError
from mhr_scale.files import to_json_lines, write_json, write_text
from mhr_scale.recipe import as_written, load, to_yaml
from mhr_scale.runlog import record_provenance, world_size
from mhr_scale.tasks.mixture import MixturePlan, Share
from mhr_scale.tokens import TokenSet, open_tokens
from mhr_scale.trainer import Trainer

T = TypeVar("T")

#: Settings that may differ when a run goes on: where and how fast, not what.
FREE_TO_CHANGE = (
    "run.ds_config",
    "run.save_every",
    "run.keep",
    "run.keep_best",
    "run.log_every",
    "run.validate_every",
    "run.timeout_seconds",
    "run.folder",
    "batch.micro_batch_size",
    "batch.workers",
    "run.token_cache",
    "run.trackers",
    "backbone.recompute",
    "monitor.alignment_every",
    "monitor.alignment_tasks",
    "monitor.alignment_rows",
)


def prepare(
    config: PretrainConfig, *, start: Adapter | None = None, save_steps: tuple[int, ...] = ()
) -> Trainer:
    """Check everything at the door, then build the backbone, the adapter and their trainer.

    Training starts from the tensors of `start`, if given, whose settings `config.adapter` has to
    repeat, and saves at `save_steps` besides what the recipe says. Collective. Nothing is written;
    no weight is read before recipe, data and layout are found good.
    """
    ds_content = read_ds_config(config.run.ds_config)
    config.batch.accumulation(world_size())
    check_folder(config)
    tracking.check(config.run.trackers)
    blueprint = backbone.read_blueprint(config.backbone)
    check_quantise(config.backbone, blueprint, ds_content, config.run.ds_config)
    check_adapter(blueprint, config.adapter)
    tokenizer = backbone.load_tokenizer(config.backbone, blueprint)
    tokens = open_tokens(config.tasks, tokenizer, config.batch, cache=config.run.token_cache)
    check_tasks(config, tokens)
    plan = make_plan(config, tokens)
    engine = Engine(ds_content, timeout_seconds=config.run.timeout_seconds)
    try:
        model = engine.build(config.backbone, blueprint)
        names = [card.name for card in tokens.cards]
        adapter = attach(model, config.adapter, tasks=names, seed=config.run.seed)
        if start is not None:
            load_tensors(adapter, named_tensors(start), place="the adapter to start from")
        model = engine.prepare(model, config.backbone)
        fingerprint.check(model, blueprint, config.backbone, engine)
        return Trainer(
            config,
            engine=engine,
            model=model,
            adapter=adapter,
            tokens=tokens,
            batches=StepBatches(
                rows=tokens.train,
                plan=plan,
                config=config.batch,
                references=config.tasks.target_choice(),
                seed=config.run.seed,
                pad_id=tokenizer.pad_token_id,
                rank=engine.rank,
                world_size=engine.world_size,
            ),
            backbone_facts=backbone_facts(config.backbone, blueprint),
            save_steps=save_steps,
            monitor=make_monitor(
                config,
                engine=engine,
                model=model,
                adapter=adapter,
                tokens=tokens,
                pad_id=tokenizer.pad_token_id,
            ),
        )
    except BaseException:
        engine.close()
        raise


def backbone_facts(config: BackboneConfig, blueprint: Blueprint) -> dict[str, Any]:
    """What an adapter's card says of the backbone it was trained on."""
    settings = {name: getattr(config, name) for name in ("dtype", "quantise", "tokenizer")}
    return {**blueprint.facts, **settings}


def check_quantise(
    config: BackboneConfig, blueprint: Blueprint, ds_content: dict[str, Any], ds_file: str | None
) -> None:
    """Raise `EngineError` or `BackboneError` if the backbone cannot be quantised where it lies."""
    sharding = ds_file if is_sharded(ds_content) else None
    quantise.check(config, blueprint.model_config, ds_config=sharding)


def backbone_of(
    adapter: str,
    card: Card,
    moved_to: str | None,
    *,
    dtype: str | None = None,
    quantise: str | None = None,
) -> BackboneConfig:
    """The backbone an adapter was trained on, which may have moved since.

    `dtype` and `quantise` override what it was trained in. Raises `AdapterError` if the adapter
    does not tell, or belongs to weights of its own.
    """
    facts = card.backbone
    if "backbone" in card.origin:
        raise AdapterError(
            f"{adapter}: was trained together with the backbone's weights, in "
            f"{card.origin['backbone']} beside it: over other weights it is worth nothing"
        )
    known = {item.name for item in fields(BackboneConfig)}
    settings = {key: value for key, value in facts.items() if key in known}
    if moved_to is not None:
        settings["name"] = moved_to
    overrides = {"dtype": dtype, "quantise": quantise}
    settings |= {key: value for key, value in overrides.items() if value is not None}
    if not settings.get("name") and not settings.get("config"):
        raise AdapterError(
            f"{adapter}: does not say which backbone it was trained on; set backbone_moved_to"
        )
    try:
        return typed.build(BackboneConfig, settings, name="backbone")
    except (TypeError, ConfigError) as error:
        raise AdapterError(f"{adapter}: its card says what cannot be: {error}") from error


def blueprint_of(adapter: str | None, config: BackboneConfig) -> Blueprint:
    """The backbone that an adapter names (None: a recipe does), read but for its weights.

    Raises `BackboneError`, which names the adapter where its backbone is not found.
    """
    try:
        return backbone.read_blueprint(config)
    except BackboneError as error:
        if adapter is None or not str(error).startswith("backbone.name: "):
            raise
        raise BackboneError(
            f"{adapter}: its backbone: {error}; set backbone_moved_to if it has moved"
        ) from error


def check_fit(adapter: str, card: Card, blueprint: Blueprint) -> None:
    """Raise `AdapterError` if an adapter was made for another backbone; no weight is read."""
    with torch.device("meta"):
        model = backbone.make_model(blueprint)
    check_backbone(Path(adapter), card, model)


def check_adapter(blueprint: Blueprint, config: AdapterConfig) -> None:
    """Raise `LayoutError` if the adapter does not fit the backbone, before any weight is read."""
    with torch.device("meta"):
        model = backbone.make_model(blueprint)
    check_splits(find_sites(model, config.layout), n_splits=config.n_splits, kind=config.kind)


def make_plan(config: PretrainConfig, tokens: TokenSet) -> MixturePlan:
    """The sample stream over the tokenised rows of all tasks."""
    shares = [
        Share(name=card.name, size=card.n_train, cap=card.cap, weight=card.weight)
        for card in tokens.cards
    ]
    return MixturePlan(shares, config=config.mixture, seed=config.run.seed)


def check_folder(config: PretrainConfig) -> None:
    """Raise `RunError` if the run folder holds a run with other settings."""
    path = Path(config.run.folder)
    stored_path = path / "config.yaml"
    check_writable(path)
    if not stored_path.exists():
        if path.is_dir() and checkpoint.find_resume(path) is not None:
            raise RunError(f"{path}: saved steps but no config.yaml; use another run.folder")
        return
    changed = [
        difference
        for key, difference in differences(read_recipe(PretrainConfig, stored_path), config)
        if key not in FREE_TO_CHANGE
    ]
    if changed and checkpoint.find_resume(path) is not None:
        raise RunError(
            f"{path}: holds a run with other settings ({listed(changed)}); use another run.folder "
            "to start anew"
        )


def read_recipe(schema: type[T], path: Path) -> T:
    """A run folder's own recipe; raises `RunError` if it cannot be read."""
    try:
        return load(schema, path)
    except ConfigError as error:
        raise RunError(f"{error}; use another run.folder") from error


def differences(before: Any, now: Any) -> list[tuple[str, str]]:
    """The settings in which two recipes differ, by their dotted names, and what to say of each."""
    old, new = (dotted(yaml.safe_load(to_yaml(recipe))) for recipe in (before, now))
    return [
        (key, f"{key} was {as_written(old.get(key))}, is {as_written(new.get(key))}")
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def listed(changed: list[str]) -> str:
    """The first of what `differences` says."""
    return "; ".join(changed[:3]) + ("; ..." if len(changed) > 3 else "")


def write_recipe(file: Path, recipe: Any) -> None:
    """Make a run folder and write a recipe into it; raises `RunError` if that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, to_yaml(recipe))
    except OSError as error:
        raise RunError(
            f"run.folder: cannot write to {file.parent} ({error.strerror}); name another folder"
        ) from error


def check_writable(path: Path) -> None:
    """Raise `RunError` if a run folder cannot be made or written to."""
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise RunError(f"run.folder: no permission to write in {parent}; name another folder")
    if path.exists() and not path.is_dir():
        raise RunError(f"run.folder: {path} is a file; name a folder")


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def rank0_open_folder(trainer: Trainer) -> None:
    """Write what a reader of the run needs before its first number."""
    config, folder = trainer.config, trainer.folder
    write_recipe(folder / "config.yaml", config)
    ds_content = read_ds_config(config.run.ds_config)
    write_json(folder / "deepspeed.json", deepspeed_config(ds_content, dtype=config.backbone.dtype))
    record_provenance(
        folder / "provenance.json",
        resumed_from=trainer.resume_step,
        world_size=trainer.engine.world_size,
        device=str(trainer.engine.device),
        placement=trainer.engine.placement,
        backbone=trainer.backbone_facts,
        data={
            "tokens": trainer.tokens.fingerprint,
            "plan": trainer.batches.plan.fingerprint,
            **trainer.tokens.cuts.facts(),
        },
    )
    rejects = to_json_lines(trainer.tokens.rejects, ensure_ascii=False)
    write_text(folder / "rejects.jsonl", rejects)
