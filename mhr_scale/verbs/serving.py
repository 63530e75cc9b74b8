"""`export`, format serving: the LoRAs of all tasks and jobs of one backbone, in one folder."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mhr_scale.adapters import artefact, find_sites, peft_files, peft_folders
from mhr_scale.adapters.config import ALL_BLOCKS
from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.backbone.of_adapter import backbone_of, blueprint_of
from mhr_scale.config import BackboneConfig, ExportConfig
from mhr_scale.errors import AdapterError, RunError, counted
from mhr_scale.exchange.export_record import RECIPE, Record, renew_card, write_record
from mhr_scale.exchange.reloading import LogitsCheck, ServedAdapter, check_mixed, spread
from mhr_scale.exchange.serving import LORAS, MANIFEST, SCRIPT, Served, Serving, ends_of
from mhr_scale.jobs.job import as_folder
from mhr_scale.jobs.served_loras import Linears, Lora, list_loras, sources_of
from mhr_scale.recipe.reading import to_yaml
from mhr_scale.run import repositories
from mhr_scale.run.files import as_size, hash_file, read_object, write_json, write_text
from mhr_scale.run.folders import check_room, check_target, moved_into_place, nearest_folder
from mhr_scale.run.runlog import Progress, log


def serve(config: ExportConfig) -> str:
    """Write the folder that servers start from; returns what there is to say of it.

    A failure leaves nothing.
    """
    target = Path(config.folder)
    check_target(target)
    loras = list_loras(config)
    blueprint = one_backbone(config, loras)
    linears = served_linears(loras, blueprint)
    n_bytes = sum(linears[lora.source.path].n_bytes(lora.source.config.rank) for lora in loras)
    check_room(nearest_folder(target), n_bytes, what="what is served")
    with moved_into_place(target) as folder:
        serving = write(config, loras, folder, blueprint=blueprint, linears=linears)
        verdict = "not checked"
        if config.check:
            verdict = check(config, loras, serving, folder, blueprint=blueprint, linears=linears)
    return closing(config, serving, verdict=verdict)


def renew(config: ExportConfig, record: Record) -> str:
    """Bring the page of an exported folder up to date; returns what there is to say of it."""
    folder = Path(config.folder)
    manifest = read_object(folder / MANIFEST, RunError)
    serving = Serving(
        base=manifest["base_model"],
        revision=manifest["revision"],
        targets=manifest["target_modules"],
        loras=[Served(**lora) for lora in manifest["loras"]],
        max_loras=config.max_loras,
        licence=licence_of(config),
    )
    renew_card(folder, record, serving.readme(folder))
    return f"{config.adapter}: what was exported is in {folder} ({config.format}) already"


# -- over what -------------------------------------------------------------------------------------


def one_backbone(config: ExportConfig, loras: Sequence[Lora]) -> Blueprint:
    """The backbone of all; raises `AdapterError` for several, and for one that is no folder."""
    sources = sources_of(loras)
    settings = [
        backbone_of(source.path, source.card, config.backbone_moved_to) for source in sources
    ]
    for source, other in zip(sources, settings, strict=True):
        ours, theirs = (
            (it.name, config.backbone_moved_to or it.revision, it.config, it.config_seed)
            for it in (settings[0], other)
        )
        if ours != theirs:
            raise AdapterError(
                f"{sources[0].path} was trained on {_told(settings[0])}, {source.path} on "
                f"{_told(other)}: a server has one backbone; export them into two folders, or set "
                "backbone_moved_to if it is the same one in two places"
            )
    if settings[0].name is None:
        raise AdapterError(
            f"{sources[0].path}: its backbone has random weights, which no server finds; save it "
            "as a folder and set backbone_moved_to"
        )
    place = repositories.parse(settings[0].name)
    if place is not None and place.folder and not repositories.is_here(settings[0].name):
        raise AdapterError(
            f"{sources[0].path}: its backbone {settings[0].name} is a folder in a repository of "
            "the hub, which servers do not open; fetch it and set backbone_moved_to"
        )
    blueprint = blueprint_of(sources[0].path, settings[0])
    if blueprint.arrangement.is_part:
        raise AdapterError(
            f"{sources[0].path}: its backbone {settings[0].name} holds other models beside the "
            "text model; convert the backbone (mhr_scale convert) and set backbone_moved_to to "
            "that folder"
        )
    return blueprint


def _told(backbone: BackboneConfig) -> str:
    """Which backbone it is, in words."""
    if backbone.name is None:
        return "random weights"
    return f"{backbone.name} at {backbone.revision}" if backbone.revision else backbone.name


def served_linears(loras: Sequence[Lora], blueprint: Blueprint) -> dict[str, Linears]:
    """The linears by source; raises `AdapterError` if an adapter does not fit the backbone."""
    with torch.device("meta"):
        model = make_model(blueprint)
    modules = [name for name, _ in model.named_modules()]
    known: dict[Any, Linears] = {}
    found = {}
    for source in sources_of(loras):
        key = (source.config.layout, source.config.blocks, source.card.sites)
        if key not in known:
            artefact.check_backbone(Path(source.path), source.card, model)
            sites = find_sites(model, source.config.layout, ALL_BLOCKS)
            known[key] = Linears(sites, ends_of([site.name for site in sites], modules))
        found[source.path] = known[key]
    return found


# -- writing ---------------------------------------------------------------------------------------


def write(
    config: ExportConfig,
    loras: Sequence[Lora],
    folder: Path,
    *,
    blueprint: Blueprint,
    linears: Mapping[str, Linears],
) -> Serving:
    """Write every LoRA once, and the manifest, the script, the page and the recipe beside them."""
    facts = blueprint.facts
    base, revision = str(facts["name"]), facts.get("commit") or facts.get("revision")
    if repositories.is_here(base):
        base, revision = str(Path(base).expanduser().absolute()), None
    model = repositories.joined(base, revision)
    served: list[Served] = []
    known: dict[tuple[str, str], str] = {}
    progress = Progress(len(loras), start=0, what="export", unit="LoRA")
    for lora in loras:
        on = linears[lora.source.path]
        padded = lora.padded(on, lora.original())
        place = f"{LORAS}/{as_folder(lora.name)}"
        written = peft_folders.write_peft_lora(padded, folder / place, base_model=model)
        settings = read_object(written / peft_files.CONFIG, AdapterError)
        write_json(written / peft_files.CONFIG, {**settings, "target_modules": on.ends})
        digest, same = (
            hash_file(written / file) for file in (peft_files.TENSORS, peft_files.CONFIG)
        )
        if (first := known.setdefault((digest, same), place)) != place:
            shutil.rmtree(written)
        served.append(
            Served(
                name=lora.name,
                folder=first,
                adapter=lora.source.path,
                task=lora.source.job.task if lora.source.job else lora.task,
                job=asdict(lora.source.job) if lora.source.job else None,
                trained_rank=lora.source.config.rank,
                rank=padded.config.rank,
                alpha=padded.config.alpha,
                sha256=digest,
            )
        )
        progress.advance(lora.name)
    progress.close()
    targets = sorted({end for on in linears.values() for end in on.ends})
    serving = Serving(
        base=base,
        revision=revision,
        targets=targets,
        loras=served,
        max_loras=config.max_loras,
        licence=licence_of(config),
    )
    write_json(folder / MANIFEST, serving.manifest())
    write_text(folder / SCRIPT, serving.script())
    write_text(folder / RECIPE, to_yaml(config))
    write_record(
        folder,
        adapter=str(repositories.pinned(config.adapter)),
        content=hash_file(folder / MANIFEST),
        backbone=facts,
        card=serving.readme(Path(config.folder)),
    )
    return serving


def licence_of(config: ExportConfig) -> dict[str, str]:
    """The licence by the hub's names of its fields."""
    fields = {
        "license": config.licence,
        "license_name": config.licence_name,
        "license_link": config.licence_link,
    }
    return {name: value for name, value in fields.items() if value is not None}


# -- checks and messages ---------------------------------------------------------------------------


def check(
    config: ExportConfig,
    loras: Sequence[Lora],
    serving: Serving,
    folder: Path,
    *,
    blueprint: Blueprint,
    linears: Mapping[str, Linears],
) -> str:
    """Compare rows of a batch that mixes LoRAs with the originals; returns the verdict in words.

    Of many LoRAs some are compared. Raises `AdapterError` if anything differs.
    """
    logits = LogitsCheck(blueprint)
    log.info(
        "comparing logits in float32: every pass reads %s of weights, and memory holds those of "
        "one module",
        as_size(logits.n_bytes),
    )
    compared = [
        ServedAdapter(
            folder=folder / serving.loras[number].folder,
            source=loras[number].source.path,
            open=loras[number].original,
            task_id=loras[number].task_id,
            make=partial(loras[number].padded, linears[loras[number].source.path]),
        )
        for number in spread(len(loras))
    ]
    try:
        worst = check_mixed(logits, compared)
    except AdapterError as error:
        raise AdapterError(f"{config.folder}: not exported: {error}") from error
    whose = f"{len(compared)} of {len(loras)}" if len(compared) < len(loras) else "all"
    agreement = f"to {worst:.1e} of the largest" if worst else "exactly"
    return f"in one batch of stock PEFT, the logits of {whose} are the originals' {agreement}"


def closing(config: ExportConfig, serving: Serving, *, verdict: str) -> str:
    """The closing message: what was written, how well it agrees, and how servers start."""
    n_loras, n_folders = len(serving.loras), len(serving.folders)
    doubles = "" if n_loras == n_folders else f" in {counted(n_folders, 'folder')}, equal ones once"
    sources = ", ".join((config.adapter, *config.also))
    what = f"{counted(n_loras, 'LoRA')}{doubles}, ranks up to {serving.max_rank}"
    lines = [f"{sources}: {what} -> {config.folder} (serving)", verdict]
    return "\n  ".join([*lines, *serving.commands(Path(config.folder))])
