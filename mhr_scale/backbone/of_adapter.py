"""An adapter and the backbone that it was trained on, and whether they fit; no weight is read."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from mhr_scale.adapters import CARD, Adapter, find_sites, peft_folders
from mhr_scale.adapters.artefact import Card, check_backbone
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.library import join
from mhr_scale.adapters.peft_files import CONFIG
from mhr_scale.adapters.rebuilding import SET_BACKBONE, local_sizes
from mhr_scale.adapters.sites import Site, check_splits
from mhr_scale.backbone import quantise as quantisation
from mhr_scale.backbone.blueprint import Blueprint, make_model, read_blueprint
from mhr_scale.backbone.hub import find_folder
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import AdapterError, BackboneError, ConfigError
from mhr_scale.recipe import typed
from mhr_scale.run import repositories
from mhr_scale.run.runlog import log

#: What a reader may have had to change to make a foreign adapter one of ours.
CHANGES = ("linears", "ranks", "scales")


def open_adapter(adapter: str, moved_to: str | None = None) -> tuple[Card, Adapter]:
    """Open an adapter of any known format; what its files leave out, its backbone tells.

    `adapter` is a path or a place on the hub (`find_place`); `repositories.last_found` then knows
    where it lies. Every verb reads adapters through here. Raises `AdapterError` for what none of
    ours can express.
    """

    def find_sizes(name: str | None, *, is_needed: bool) -> Mapping[str, Any] | None:
        name = moved_to or name
        found = local_sizes(name)
        if found is not None or not is_needed or name is None:
            return found
        try:
            folder = find_folder(name, None, files=("config.json",))
        except BackboneError as error:
            raise _not_found(adapter, error) from error
        return local_sizes(str(folder))

    card, opened = peft_folders.open_adapter(adapter, sizes=find_sizes)
    for change in CHANGES:
        if change in card.origin:
            log.info("%s: its %s: %s", adapter, change, card.origin[change])
    if card.precision != "float32":
        log.info("%s: stored in %s, held in float32", adapter, card.precision)
    return card, opened


def open_library(adapter: str, moved_to: str | None = None) -> tuple[Card, Adapter]:
    """Open an adapter, or a folder here whose folders are single LoRAs, as one with all of them.

    Raises `AdapterError` if these are no LoRAs, or of different backbones or layouts.
    """
    path = Path(adapter)
    folders = [file.parent for name in (CARD, CONFIG) for file in path.glob(f"*/{name}")]
    own = (CARD, CONFIG, f"adapter/{CARD}", f"adapter/{CONFIG}")
    if not folders or any((path / name).is_file() for name in own):
        return open_adapter(adapter, moved_to)
    opened = {str(folder): open_adapter(str(folder), moved_to) for folder in sorted(folders)}
    named = {Path(folder).name: single for folder, (_, single) in opened.items()}
    cards = [card for card, _ in opened.values()]
    bases = {_base(card): folder for card, folder in zip(cards, opened, strict=True)}
    if len(bases) > 1 and moved_to is None:
        pairs = ", ".join(f"{Path(folder).name} of {base}" for base, folder in bases.items())
        raise AdapterError(f"{adapter}: LoRAs of different backbones: {pairs}; {SAME}")
    library = join(named, place=adapter)
    return replace(cards[0], adapter=library.config, task_names=library.task_names), library


#: The way out where one backbone has several names.
SAME = "keep those of one backbone, or, if they are one, set backbone_moved_to"


def _base(card: Card) -> str:
    """The backbone that a card names, at its commit or revision if it says one."""
    name, revision = card.backbone.get("name"), card.backbone.get("commit")
    revision = revision or card.backbone.get("revision")
    return f"{name or 'random weights'}{f'@{revision}' if revision else ''}"


def _not_found(adapter: str, error: BackboneError) -> BackboneError:
    return BackboneError(f"{adapter}: its backbone: {error}; if it has moved, {SET_BACKBONE}")


def backbone_facts(config: BackboneConfig, blueprint: Blueprint) -> dict[str, Any]:
    """The `backbone` entry of an adapter's card."""
    settings = {"dtype": config.dtype, "tokenizer": repositories.pinned(config.tokenizer)}
    return {**blueprint.facts, **settings, "quantise": quantisation.kind_of(config, blueprint)}


def backbone_of(
    adapter: str,
    card: Card,
    moved_to: str | None,
    *,
    dtype: str | None = None,
    quantise: str | None = None,
) -> BackboneConfig:
    """The backbone an adapter was trained on, which may have moved since; of the hub its commit.

    `dtype` and `quantise` override those of the training. Raises `AdapterError` if the adapter's
    card does not name it, or if the adapter was trained together with the backbone's weights.
    """
    facts = card.backbone
    if "backbone" in card.origin:
        raise AdapterError(
            f"{adapter}: was trained together with the backbone's weights, in "
            f"{card.origin['backbone']} beside it: over other weights it is worth nothing"
        )
    known = {item.name for item in fields(BackboneConfig)}
    settings = {key: value for key, value in facts.items() if key in known}
    if facts.get("commit"):
        settings["revision"] = facts["commit"]
    if moved_to is not None:
        settings |= {"name": moved_to, "revision": None}
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
    """Read the backbone that an adapter names (None: a recipe names it), but no weight.

    Raises `BackboneError`, which names the adapter if its backbone is not found.
    """
    try:
        return read_blueprint(config)
    except BackboneError as error:
        if adapter is None or not str(error).startswith("backbone.name: "):
            raise
        raise _not_found(adapter, error) from error


def check_fit(adapter: str, card: Card, blueprint: Blueprint) -> None:
    """Raise `AdapterError` if an adapter was made for another backbone; no weight is read."""
    with torch.device("meta"):
        model = make_model(blueprint)
    check_backbone(Path(adapter), card, model)


def find_sites_of(blueprint: Blueprint, config: AdapterConfig) -> tuple[Site, ...]:
    """The linears that an adapter of these settings wraps; no weight is read.

    Raises `LayoutError` if the adapter does not fit the backbone.
    """
    with torch.device("meta"):
        model = make_model(blueprint)
    sites = find_sites(model, config.layout, config.blocks)
    check_splits(sites, n_splits=config.n_splits, kind=config.kind)
    return sites
