"""The verb `export`: an adapter in, a folder that stock PEFT or transformers loads out.

The written folder is loaded again and its logits are compared before it is moved into place. The
verb also imports: any adapter that can be read can be written as this package's own artefact.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter, artefact, peft_folders
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.adapters.collapse import collapse, soup
from mhr_scale.adapters.sites import family_of_sites
from mhr_scale.backbone import hub, merging
from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.of_adapter import backbone_of, blueprint_of, check_fit, open_adapter
from mhr_scale.backbone.shards import Weight, check_free_space
from mhr_scale.config import BackboneConfig, ExportConfig
from mhr_scale.errors import AdapterError
from mhr_scale.exchange.reloading import (
    N_ROWS,
    ExportedAdapter,
    LogitsCheck,
    check_merged,
    check_native,
    check_peft,
    expected_logits,
    spread,
)
from mhr_scale.jobs.job import as_folder, check_folders
from mhr_scale.recipe.reading import to_yaml
from mhr_scale.run.files import as_size, write_json, write_text
from mhr_scale.run.folders import check_target, moved_into_place, nearest_folder
from mhr_scale.run.runlog import Progress, log, rank
from mhr_scale.run.streams import write_result
from mhr_scale.verbs.serving import serve


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportInputs:
    """What an export reads: the stored adapter, and its backbone where one is needed."""

    card: artefact.Card
    stored: Adapter
    settings: BackboneConfig | None
    blueprint: Blueprint | None
    weights: list[Weight]
    facts: dict[str, Any]


def export(config: ExportConfig) -> Path:
    """Write the folder that `config` asks for, and return it.

    Only rank 0 works; other processes of a launcher return at once. A failed export leaves nothing.
    """
    target = Path(config.folder)
    if rank():
        return target
    if config.format == "serving":
        return serve(config)
    check_target(target)
    inputs = open_inputs(config)
    parts = choose(config, inputs)
    with moved_into_place(target) as folder:
        write(config, inputs, parts, folder)
        verdict = check(config, inputs, parts, folder) if config.check else "not checked"
    write_result(closing(config, inputs, parts, verdict=verdict) + "\n")
    return target


# -- before anything is written --------------------------------------------------------------------


def open_inputs(config: ExportConfig) -> ExportInputs:
    """Read the adapter, and what the format or the check needs of its backbone, but no weights.

    Raises `AdapterError` if the adapter does not fit the backbone, or needs trained backbone
    weights that the format cannot hold.
    """
    card, stored = open_adapter(config.adapter, config.backbone_moved_to)
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
        blueprint = blueprint_of(config.adapter, settings)
        check_fit(config.adapter, card, blueprint)
        if blueprint.arrangement.is_part and config.format in ("peft", "peft_poly"):
            raise AdapterError(
                f"{config.adapter}: its backbone {settings.name} holds other models beside the "
                "text model, and transformers calls its linears otherwise there; convert the "
                "backbone (mhr_scale convert) and set backbone_moved_to to that folder"
            )
        facts |= blueprint.facts
    if config.format == "merged":
        assert blueprint is not None
        if trained:
            file = artefact.find(config.adapter) / trained
            file = file if file.is_file() else file.parent.parent / trained
            blueprint = merging.with_weights(blueprint, file)
        weights = merging.plan_weights(blueprint, config.dtype)
        check_free_space(nearest_folder(Path(config.folder)), weights, what="the merged backbone")
    return ExportInputs(
        card=card,
        stored=stored,
        settings=settings,
        blueprint=blueprint,
        weights=weights,
        facts=facts,
    )


def open_backbone(config: ExportConfig, card: artefact.Card) -> BackboneConfig:
    """The pre-trained backbone; raises `AdapterError` if the adapter does not name it."""
    try:
        return backbone_of(config.adapter, replace(card, origin={}), config.backbone_moved_to)
    except AdapterError as error:
        way_out = "" if config.format == "merged" else ", or check: false"
        raise AdapterError(f"{error}{way_out}") from error


# -- what is exported ------------------------------------------------------------------------------


def choose(config: ExportConfig, inputs: ExportInputs) -> list[ExportedAdapter]:
    """The adapters to export; raises `AdapterError` if the stored one cannot provide them."""
    what = config.what or natural_choice(config, inputs.stored)
    try:
        parts = parts_of(what, config, inputs.stored)
        first = parts[0].make()
    except AdapterError as error:
        raise AdapterError(f"{config.adapter}: {error}") from error
    if config.format in ("peft", "merged") and not is_single(first):
        raise AdapterError(
            f"{config.adapter}: {first.config.method} of {first.config.n_skills} skill(s) and "
            f"{len(first.task_names)} task(s) is no single adapter; set what: average or what: "
            "task, or format: peft_poly or native for the whole"
        )
    return parts


def is_single(adapter: Adapter) -> bool:
    """Whether an adapter is one pair, or one vector, per linear."""
    return not (adapter.config.is_routed or adapter.config.private)


def natural_choice(config: ExportConfig, stored: Adapter) -> str:
    """What is exported if the recipe leaves `what` open (`ExportConfig.what`)."""
    if config.format in ("native", "peft_poly") or is_single(stored):
        return "whole"
    has_tasks = stored.config.has_logits or stored.config.private
    return "task" if has_tasks and len(stored.task_names) == 1 else "average"


def parts_of(what: str, config: ExportConfig, stored: Adapter) -> list[ExportedAdapter]:
    """The adapters that `what` names; the average of a single adapter is the adapter itself."""
    if what in ("task", "all_tasks"):
        names = stored.task_names if what == "all_tasks" else [config.task or stored.task_names[0]]
        check_folders(names, what="tasks")
        return [
            ExportedAdapter(
                what=what,
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
        return [ExportedAdapter(what="whole", make=lambda: stored, original=stored, task_ids=rows)]
    single = soup(stored, config.tasks) if what == "soup" else mean_of(stored)
    return [ExportedAdapter(what=what, make=lambda: single, original=single)]


# -- writing ---------------------------------------------------------------------------------------


def write(
    config: ExportConfig, inputs: ExportInputs, parts: list[ExportedAdapter], folder: Path
) -> None:
    """Write every part below `folder`, and the recipe beside them."""
    is_many = parts[0].what == "all_tasks"
    progress = Progress(len(parts), start=0, what="export", unit="task") if is_many else None
    for part in parts:
        try:
            write_part(config, inputs, part, folder / part.folder)
        except AdapterError as error:
            raise AdapterError(str(error).replace(str(folder), config.folder)) from error
        if progress:
            progress.advance(part.folder)
    if progress:
        progress.close()
        names = {part.folder: inputs.stored.task_names[part.task_ids[0]] for part in parts}
        write_json(folder / "tasks.json", names)
    write_text(folder / "export.yaml", to_yaml(config))


def write_part(
    config: ExportConfig, inputs: ExportInputs, part: ExportedAdapter, folder: Path
) -> None:
    """Write one adapter in the format asked for."""
    adapter, name = part.make(), base_name(inputs.facts)
    if config.format == "native":
        origin = {"exported_from": config.adapter, "what": part.what}
        if "dtype" in inputs.card.origin:
            origin["dtype"] = inputs.card.precision
        artefact.save(adapter, folder, step=inputs.card.step, backbone=inputs.facts, origin=origin)
    elif config.format == "peft_poly":
        peft_folders.write_peft_poly(adapter, folder, base_model=name)
    elif config.format == "merged":
        assert inputs.blueprint is not None
        assert inputs.settings is not None
        merging.write_merged(
            adapter,
            folder,
            blueprint=inputs.blueprint,
            weights=inputs.weights,
            max_shard_bytes=config.max_shard_bytes,
        )
        merging.write_companions(
            folder, blueprint=inputs.blueprint, settings=inputs.settings, weights=inputs.weights
        )
    elif adapter.config.kind == "ia3":
        peft_folders.write_peft_ia3(adapter, folder, base_model=name)
    else:
        peft_folders.write_peft_lora(adapter, folder, base_model=name)


def base_name(facts: dict[str, Any]) -> str | None:
    """The backbone as other programs find it: hub id or folder; None for random weights."""
    name = facts.get("name")
    return str(hub.BUILTIN.get(name, name)) if name else None


# -- checks and messages ---------------------------------------------------------------------------


def check(
    config: ExportConfig, inputs: ExportInputs, parts: list[ExportedAdapter], folder: Path
) -> str:
    """Compare the logits of the written folder with the original's; returns the verdict in words.

    Of many tasks only some are compared. Raises `AdapterError` if anything differs.
    """
    assert inputs.blueprint is not None
    logits = LogitsCheck(inputs.blueprint)
    log.info(
        "comparing logits in float32: every pass reads %s of weights, and memory holds those of "
        "one module",
        as_size(logits.n_bytes),
    )
    is_peft = inputs.card.origin.get("format", "").startswith("PEFT")
    compared, worst, rounding = [parts[n] for n in spread(len(parts))], 0.0, 0.0
    try:
        if is_peft and config.format == "native" and parts[0].what == "whole":  # an import
            originals = [logits.peft(Path(config.adapter), parts[0].task_ids)]
        else:
            originals = expected_logits(logits, compared)
        for part, expected in zip(compared, originals, strict=True):
            place = folder / part.folder
            if config.format == "merged":
                difference, rounding = check_merged(
                    logits, part, place, expected=expected, weights=inputs.weights
                )
            elif config.format == "native":
                difference = check_native(logits, part, place, expected=expected)
            else:
                difference = check_peft(logits, part, place, expected=expected)
            worst = max(worst, difference)
    except AdapterError as error:
        raise AdapterError(f"{config.folder}: not exported: {error}") from error
    whose = "the logits"
    if len(parts) > 1:
        whose += f" of the {len(parts)} tasks"
    if len(compared) < len(parts):
        whose = f"{len(compared)} of {len(parts)} tasks were compared: their logits"
    text = f"{whose} are the original's {f'to {worst:.1e} of the largest' if worst else 'exactly'}"
    if rounding:
        text += f"; rounding the weights to their data type moves them by {rounding:.1e}"
    return text


def closing(
    config: ExportConfig, inputs: ExportInputs, parts: list[ExportedAdapter], *, verdict: str
) -> str:
    """The closing message: what was written, how well it agrees, and the lines that load it."""
    base = base_name(inputs.facts) or "FOLDER OF THE BACKBONE"
    place = str(Path(config.folder) / parts[0].folder)
    auto_class = family_of_sites(inputs.stored.sites).auto_class
    load = f"model = {auto_class}.from_pretrained"
    lines = {
        "merged": [f"from transformers import {auto_class}", f'{load}("{place}")'],
        "native": ["from mhr_scale import load_adapter", f'adapter = load_adapter("{place}")'],
    }.get(
        config.format,
        [
            f"from peft import PeftModel; from transformers import {auto_class}",
            f'{load}("{base}")',
            f'model = PeftModel.from_pretrained(model, "{place}")',
        ],
    )
    if config.format == "peft_poly":
        lines.append("model(..., task_ids=...): places in task_names of mhr_scale.json")
    names = {
        "whole": "the adapter as it is",
        "average": "the average",
        "task": f"task {inputs.stored.task_names[parts[0].task_ids[0]]}",
        "all_tasks": f"{len(parts)} tasks, a folder each",
        "soup": f"the soup of {', '.join(config.tasks)}",
    }
    what = names[parts[0].what]
    text = f"{config.adapter}: {what} -> {config.folder} ({config.format})\n  {verdict}\n  load:"
    return "\n    ".join([text, *lines])
