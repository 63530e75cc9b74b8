"""The verb `export`: an adapter in, a folder that stock PEFT or transformers loads out.

The written folder is loaded again and its logits are compared before it is moved into place; then
it may be pushed to the hub. The verb also imports: any adapter that can be read can be written as
this package's own artefact.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter, artefact, peft_folders
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.adapters.collapse import collapse, soup
from mhr_scale.backbone import hub, merging
from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.of_adapter import backbone_of, blueprint_of, check_fit, open_adapter
from mhr_scale.backbone.shards import Weight, check_free_space
from mhr_scale.config import BackboneConfig, ExportConfig
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.exchange.export_record import RECIPE, Record, read_record, renew_card, write_record
from mhr_scale.exchange.model_card import Exported, load_lines, write_card
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
from mhr_scale.run import repositories
from mhr_scale.run.files import as_size, write_json, write_text
from mhr_scale.run.folders import check_target, moved_into_place, nearest_folder
from mhr_scale.run.runlog import Progress, log, rank
from mhr_scale.run.streams import write_result
from mhr_scale.verbs import serving


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
    """Write the folder that `config` asks for, push it where that is asked for, and return it.

    Only rank 0 works; other processes of a launcher return at once. A failed export leaves nothing,
    a failed push the folder: the same command then pushes alone.
    """
    target = Path(config.folder)
    if rank():
        return target
    place = repositories.target(config.hub) if config.hub is not None else None
    record = read_record(config)
    if config.format == "serving":
        words = serving.serve(config) if record is None else serving.renew(config, record)
    elif record is None:
        check_target(target)
        inputs = open_inputs(config)
        parts = choose(config, inputs)
        with moved_into_place(target) as folder:
            write(config, inputs, parts, folder)
            verdict = check(config, inputs, parts, folder) if config.check else "not checked"
        words = closing(config, inputs, parts, verdict=verdict)
    else:
        words = renew(config, record)
    write_result(words + "\n")
    if place is not None:
        message = config.hub_message or f"{words.splitlines()[0]}"
        commit = repositories.push(target, place, private=config.hub_private, message=message)
        write_result(f"pushed to {place}: commit {commit}\n")
    return target


def renew(config: ExportConfig, record: Record) -> str:
    """Bring the model card of an exported folder up to date; returns what there is to say of it.

    Raises `RunError` if the adapter that it was exported from is another one now.
    """
    card, stored = open_adapter(config.adapter, config.backbone_moved_to)
    if artefact.digest(stored) != record.content:
        raise RunError(
            f"folder: {config.folder} was exported from {record.adapter}, and {config.adapter} "
            "holds another adapter now; name another folder"
        )
    inputs = ExportInputs(
        card=card, stored=stored, settings=None, blueprint=None, weights=[], facts=record.backbone
    )
    parts = choose(config, inputs)
    told = tell(config, inputs, parts)
    renew_card(Path(config.folder), record, write_card(told))
    return f"{config.adapter}: {told.words} is in {config.folder} ({config.format}) already"


# -- before anything is written --------------------------------------------------------------------


def open_inputs(config: ExportConfig) -> ExportInputs:
    """Read the adapter, and what the format or the check needs of its backbone, but no weights.

    Raises `AdapterError` if the adapter does not fit the backbone, or needs trained backbone
    weights that the format cannot hold.
    """
    card, stored = open_adapter(config.adapter, config.backbone_moved_to)
    facts = dict(card.backbone)
    if config.backbone_moved_to is not None:
        name, revision = repositories.split(config.backbone_moved_to)
        facts = {key: value for key, value in facts.items() if key not in ("commit", "folder")}
        facts |= {"name": name, "revision": revision}
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
        asked = {"revision": facts["revision"]} if "commit" in facts else {}
        facts |= {**blueprint.facts, **asked}  # which was opened at that commit
    if config.format == "merged":
        assert blueprint is not None
        if trained:
            file = artefact.find(repositories.last_found(config.adapter).path) / trained
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
    if config.clusters is not None:
        from mhr_scale.analysis import clusters  # needs scipy, which no other export does

        joined = clusters.cluster_tasks(stored, config.clusters.number, seed=config.clusters.seed)
        skilled = clusters.to_skills(stored, joined, logit=config.clusters.logit)
        ids = tuple(range(len(joined)))[:N_ROWS]
        ids += (0,) * (N_ROWS - len(ids))
        return [ExportedAdapter(what=what, make=lambda: skilled, original=skilled, task_ids=ids)]
    single = soup(stored, config.tasks) if what == "soup" else mean_of(stored)
    return [ExportedAdapter(what=what, make=lambda: single, original=single)]


# -- writing ---------------------------------------------------------------------------------------


def write(
    config: ExportConfig, inputs: ExportInputs, parts: list[ExportedAdapter], folder: Path
) -> None:
    """Write every part below `folder`, and the recipe, the model card and the record beside."""
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
        write_json(folder / "tasks.json", folders_of(inputs, parts))
    if parts[0].what == "clusters":
        from mhr_scale.analysis.clusters import members

        write_json(folder / "clusters.json", members(parts[0].make()))
    write_text(folder / RECIPE, to_yaml(config))
    write_record(
        folder,
        adapter=str(repositories.pinned(config.adapter)),
        content=artefact.digest(inputs.stored),
        backbone=inputs.facts,
        card=write_card(tell(config, inputs, parts)),
    )


def write_part(
    config: ExportConfig, inputs: ExportInputs, part: ExportedAdapter, folder: Path
) -> None:
    """Write one adapter in the format asked for."""
    adapter, name = part.make(), base_name(inputs.facts)
    if config.format == "native":
        origin = {
            "exported_from": str(repositories.pinned(config.adapter)),
            "what": part.what,
        }
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
    """The backbone as other programs find it: hub id or folder; None for random weights.

    Of the hub with the commit, or the revision where that is all that is known.
    """
    if not facts.get("name"):
        return None
    name, revision = str(facts["name"]), facts.get("commit") or facts.get("revision")
    return str(hub.BUILTIN.get(name, repositories.joined(name, revision)))


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
            source = repositories.last_found(config.adapter).path
            originals = [logits.peft(source, parts[0].task_ids)]
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


def tell(config: ExportConfig, inputs: ExportInputs, parts: list[ExportedAdapter]) -> Exported:
    """What there is to say of an export."""
    names = {
        "whole": "the adapter as it is",
        "average": "the average",
        "task": f"task {inputs.stored.task_names[parts[0].task_ids[0]]}",
        "all_tasks": f"{len(parts)} tasks, a folder each",
        "clusters": f"a skill for each of {parts[0].make().config.n_skills} clusters of tasks",
        "soup": f"the soup of {', '.join(config.tasks)}",
    }
    return Exported(
        config=config,
        card=inputs.card,
        stored=inputs.stored,
        adapter=parts[0].make(),
        folders=folders_of(inputs, parts),
        words=names[parts[0].what],
        base=base_name(inputs.facts),
        facts=inputs.facts,
    )


def folders_of(inputs: ExportInputs, parts: list[ExportedAdapter]) -> dict[str, str]:
    """Tasks by the folders of their adapters; none where there is one adapter."""
    if parts[0].what != "all_tasks":
        return {}
    return {part.folder: inputs.stored.task_names[part.task_ids[0]] for part in parts}


def closing(
    config: ExportConfig, inputs: ExportInputs, parts: list[ExportedAdapter], *, verdict: str
) -> str:
    """The closing message: what was written, how well it agrees, and the lines that load it."""
    told = tell(config, inputs, parts)
    place = str(Path(config.folder) / parts[0].folder)
    text = f"{config.adapter}: {told.words} -> {config.folder} ({config.format})\n  {verdict}"
    return "\n    ".join([f"{text}\n  load:", *load_lines(told, place)])
