"""The verb `export`: an adapter in, a folder that stock PEFT or transformers loads out.

What was written is loaded again and its logits are compared before it is moved into place. It also
imports: any adapter that can be read can be written as this package's own artefact.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mhr_scale import backbone, merging
from mhr_scale.adapters import Adapter, interop, state
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.adapters.collapse import collapse, soup
from mhr_scale.backbone import Blueprint
from mhr_scale.config import BackboneConfig, ExportConfig
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.jobs.job import as_folder
from mhr_scale.recipe import to_yaml
from mhr_scale.reloading import N_ROWS, Bench, check_same, difference, spread
from mhr_scale.runlog import Progress, log, rank, write_json, write_text
from mhr_scale.runs import backbone_of, check_fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is exported from: the stored adapter, and its backbone where one is needed."""

    card: state.Card
    stored: Adapter
    settings: BackboneConfig | None
    blueprint: Blueprint | None
    weights: list[merging.Weight]
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One folder to be written, and the adapter and task numbers it has to agree with.

    `make` gives the adapter that goes into it; `folder` is its place below the target.
    """

    make: Callable[[], Adapter]
    original: Adapter
    task_ids: tuple[int, ...] = (0,) * N_ROWS
    folder: str = "."


def export(config: ExportConfig) -> Path:
    """Write the folder that `config` asks for, and return it.

    One process works; others that a launcher started leave at once. A failed export leaves nothing.
    """
    target = Path(config.folder)
    if rank():
        return target
    check_target(target)
    source = open_source(config)
    what, parts = choose(config, source)
    with moved_into_place(target) as folder:
        write(config, source, parts, folder, target=target)
        found = ""
        if config.check:
            bench = Bench(source.blueprint)
            checks = {"merged": check_merged}
            found = checks.get(config.format, check_adapters)(config, source, parts, folder, bench)
    log.info("%s", closing(config, source, what=what, n_parts=len(parts), found=found))
    return target


# --- at the door


def check_target(target: Path) -> None:
    """Raise `RunError` if the target is not absent or an empty folder that can be replaced."""
    if target.exists() and not target.is_dir():
        raise RunError(f"folder: {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise RunError(f"folder: {target} is not empty; name another folder, or empty it")
    if os.path.ismount(target):
        raise RunError(f"folder: {target} is where a disk is mounted; name a folder below it")
    above = nearest_folder(target)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RunError(f"folder: cannot write in {above}; name another folder")


def nearest_folder(target: Path) -> Path:
    """The nearest path above `target` that exists."""
    return next(path for path in target.absolute().parents if path.exists())


def open_source(config: ExportConfig) -> Source:
    """Read the adapter, and of its backbone what the format or the check needs; no weight yet.

    Raises `AdapterError` if the adapter is of another backbone, or is half of a trained backbone.
    """
    card, stored = interop.open_adapter(config.adapter)
    facts = dict(card.backbone)
    if config.backbone_moved_to is not None:
        facts["name"] = config.backbone_moved_to
    trained = card.origin.get("backbone")
    if trained and config.format != "merged":
        raise AdapterError(
            f"{config.adapter}: this job trained the backbone's weights too ({trained}), its "
            "adapter is worth nothing without them; set format: merged"
        )
    settings, blueprint, weights = None, None, []
    if config.check or config.format == "merged":
        settings = open_backbone(config, card)
        blueprint = backbone.read_blueprint(settings)
        check_fit(config.adapter, card, blueprint)
        facts |= blueprint.facts
    if config.format == "merged":
        assert blueprint is not None
        if trained:
            file = state.find(config.adapter) / trained
            file = file if file.is_file() else file.parent.parent / trained
            blueprint = merging.with_weights(blueprint, file)
        weights = merging.plan_weights(blueprint, config.dtype)
        merging.check_free_space(nearest_folder(Path(config.folder)), weights)
    return Source(
        card=card,
        stored=stored,
        settings=settings,
        blueprint=blueprint,
        weights=weights,
        facts=facts,
    )


def open_backbone(config: ExportConfig, card: state.Card) -> BackboneConfig:
    """The adapter's backbone; raises `AdapterError` if the adapter does not tell."""
    try:
        return backbone_of(config.adapter, card, config.backbone_moved_to)
    except AdapterError as error:
        way_out = "" if config.format == "merged" else ", or check: false"
        raise AdapterError(f"{error}{way_out}") from error


# --- what is exported


def choose(config: ExportConfig, source: Source) -> tuple[str, list[Part]]:
    """What is exported, and its parts; raises `AdapterError` if the adapter does not have them."""
    what = config.what or natural_choice(config, source.stored)
    try:
        parts = parts_of(what, config, source.stored)
        first = parts[0].make()
    except AdapterError as error:
        raise AdapterError(f"{config.adapter}: {error}") from error
    if config.format in ("peft", "merged") and not is_single(first):
        raise AdapterError(
            f"{config.adapter}: {first.config.method} of {first.config.n_skills} skill(s) and "
            f"{len(first.task_names)} task(s) is no single adapter; set what: average or what: "
            "task, or format: peft_poly or native for the whole"
        )
    return what, parts


def is_single(adapter: Adapter) -> bool:
    """Whether an adapter is one pair, or one vector, per linear."""
    return not (adapter.config.is_routed or adapter.config.private)


def natural_choice(config: ExportConfig, stored: Adapter) -> str:
    """What is exported where the recipe does not say (`ExportConfig.what`)."""
    if config.format in ("native", "peft_poly") or is_single(stored):
        return "whole"
    own = stored.config.has_logits or stored.config.private
    return "task" if own and len(stored.task_names) == 1 else "average"


def parts_of(what: str, config: ExportConfig, stored: Adapter) -> list[Part]:
    """The parts of `what`; single adapters stand for their own average."""
    if what in ("task", "all_tasks"):
        names = stored.task_names if what == "all_tasks" else [config.task or stored.task_names[0]]
        return [
            Part(
                make=partial(collapse, stored, name),
                original=stored,
                task_ids=stored.check_task_ids([name]) * N_ROWS,
                folder=as_folder(name) if what == "all_tasks" else ".",
            )
            for name in names
        ]
    if what == "whole" or (what == "average" and is_single(stored)):
        numbers = spread(len(stored.task_names))
        rows = tuple(numbers[row % len(numbers)] for row in range(N_ROWS))
        return [Part(make=lambda: stored, original=stored, task_ids=rows)]
    single = soup(stored, config.tasks) if what == "soup" else mean_of(stored)
    return [Part(make=lambda: single, original=single)]


# --- writing


@contextmanager
def moved_into_place(target: Path) -> Iterator[Path]:
    """A folder on the target's disk that becomes the target, or nothing if the block fails."""
    place = Path(os.path.realpath(target))
    unfinished = nearest_folder(place) / f".{place.name}.unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished, place)
    except OSError as error:
        raise RunError(f"folder: cannot write to {target} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write(
    config: ExportConfig, source: Source, parts: list[Part], folder: Path, *, target: Path
) -> None:
    """Write every part below `folder`, and the recipe beside them."""
    progress = Progress(len(parts), start=0, what="export", unit="task")
    for part in parts:
        place = folder / part.folder
        try:
            write_part(config, source, part.make(), place)
        except AdapterError as error:
            raise AdapterError(str(error).replace(str(folder), str(target))) from error
        if len(parts) > 1:
            progress.advance(part.folder)
    progress.close()
    if config.what == "all_tasks":
        names = {part.folder: source.stored.task_names[part.task_ids[0]] for part in parts}
        write_json(folder / "tasks.json", names)
    write_text(folder / "export.yaml", to_yaml(config))


def write_part(config: ExportConfig, source: Source, adapter: Adapter, folder: Path) -> None:
    """Write one adapter in the format asked for."""
    name = base_name(source.facts)
    if config.format == "native":
        origin = {"exported_from": config.adapter, "what": config.what or "whole"}
        state.save(adapter, folder, step=source.card.step, backbone=source.facts, origin=origin)
    elif config.format == "peft_poly":
        interop.write_peft_poly(adapter, folder, base_model=name)
    elif config.format == "merged":
        assert source.blueprint is not None
        assert source.settings is not None
        merging.write_merged(
            adapter,
            folder,
            blueprint=source.blueprint,
            weights=source.weights,
            max_shard_bytes=config.max_shard_bytes,
        )
        merging.write_companions(
            folder, blueprint=source.blueprint, settings=source.settings, weights=source.weights
        )
    elif adapter.config.kind == "ia3":
        interop.write_peft_ia3(adapter, folder, base_model=name)
    else:
        interop.write_peft_lora(adapter, folder, base_model=name)
