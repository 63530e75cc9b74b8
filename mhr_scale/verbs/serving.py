"""`export`, format serving: the LoRAs of all tasks and jobs of one backbone, in one folder.

Jobs can be thousands, so their adapters are opened one after the other; all that can be wrong with
them is told by their cards, before anything is written.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mhr_scale.adapters import Adapter, artefact, find_sites, peft_files, peft_folders
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.collapse import average, collapse
from mhr_scale.adapters.config import ALL_BLOCKS, AdapterConfig
from mhr_scale.adapters.padding import pad
from mhr_scale.adapters.sites import Site, family_of_sites
from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.backbone.of_adapter import backbone_of, blueprint_of, open_adapter
from mhr_scale.config import ExportConfig
from mhr_scale.errors import AdapterError, counted, some, suggest
from mhr_scale.exchange.reloading import LogitsCheck, ServedAdapter, check_mixed, spread
from mhr_scale.exchange.serving import (
    LORAS,
    MANIFEST,
    README,
    SCRIPT,
    Served,
    Serving,
    ends_of,
    served_rank,
)
from mhr_scale.jobs.job import Job, as_folder, check_folders, read_all_results
from mhr_scale.recipe.reading import to_yaml
from mhr_scale.run.files import as_size, hash_file, read_object, write_json, write_text
from mhr_scale.run.folders import check_room, check_target, moved_into_place, nearest_folder
from mhr_scale.run.runlog import Progress, log
from mhr_scale.run.streams import write_result


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An adapter that LoRAs come from: where it lies, its card, and itself unless it is a job's."""

    path: str
    card: Card
    job: Job | None = None
    adapter: Adapter | None = None

    def open(self) -> Adapter:
        """The adapter, read if it is a job's."""
        return artefact.load(self.path) if self.adapter is None else self.adapter

    @property
    def config(self) -> AdapterConfig:
        """Its settings."""
        return self.card.adapter

    @property
    def has_tasks(self) -> bool:
        """Whether each of its tasks has a LoRA of its own."""
        return self.config.has_logits or self.config.private


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """One LoRA that is served: an adapter under one task's routing, its average, or itself."""

    name: str
    source: Source
    task: str | None

    @property
    def task_id(self) -> int:
        """The row of the source's routing table, or its private inventory."""
        return 0 if self.task is None else self.source.card.task_names.index(self.task)

    def original(self) -> Adapter:
        """The adapter that its logits are compared with: routed, where there is routing."""
        adapter = self.source.open()
        return average(adapter) if self._is_average else adapter

    def padded(self, linears: "Linears", original: Adapter) -> Adapter:
        """What is written, at a rank and on linears that servers take."""
        single = original if self.task is None else collapse(original, self.task)
        return pad(single, rank=served_rank(single.config.rank), sites=linears.sites)

    @property
    def _is_average(self) -> bool:
        """Whether its source has skills, but no routing of tasks."""
        return self.task is None and self.source.config.is_routed


def serve(config: ExportConfig) -> Path:
    """Write the folder that servers start from, and return it. A failure leaves nothing."""
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
    write_result(closing(config, serving, verdict=verdict) + "\n")
    return target


# -- what is served --------------------------------------------------------------------------------


def list_loras(config: ExportConfig) -> list[Lora]:
    """Every LoRA by its name; raises `AdapterError` for what no server takes, and for a clash."""
    sources = [
        source for path in (config.adapter, *config.also) for source in read_sources(path, config)
    ]
    if config.jobs != "*" and not any(source.job for source in sources):
        raise AdapterError(f"jobs: '{config.jobs}', and no run folder of adapt is exported")
    for source in sources:
        check_kind(source)
    known = {source.job.task for source in sources if source.job} | {
        task for source in sources if source.has_tasks for task in source.card.task_names
    }
    for task in config.tasks:
        if task not in known:
            raise AdapterError(f"tasks: none is called '{task}'{suggest(task, sorted(known))}")
    wanted = set(config.tasks) or known
    loras = [lora for source in sources for lora in loras_of(source) if _is_wanted(lora, wanted)]
    first: dict[str, Lora] = {}
    for lora in loras:
        if (other := first.setdefault(lora.name, lora)) is not lora:
            raise AdapterError(
                f"also: {other.source.path} and {lora.source.path} both have a LoRA called "
                f"'{lora.name}'; export them into two folders"
            )
    check_folders(first, what="LoRAs")
    return loras


def read_sources(path: str, config: ExportConfig) -> Iterator[Source]:
    """The adapter of a path, or those of the finished jobs of a run folder of `adapt`."""
    run = Path(path)
    if not (run / "jobs").is_dir():
        card, adapter = open_adapter(path, config.backbone_moved_to)
        yield Source(path=path, card=card, adapter=adapter)
        return
    finished = [
        Job(task=result["task"], seed=result["seed"], variant=result["variant"])
        for result in read_all_results(run)
    ]
    if not finished:
        raise AdapterError(f"{path}: no job has finished yet; adapt goes on where it was stopped")
    chosen = [job for job in finished if fnmatchcase(served_name(job), config.jobs)]
    if not chosen:
        names = some((served_name(job) for job in finished), shown=3)
        raise AdapterError(f"{path}: jobs: '{config.jobs}' is none of {names}")
    if unfinished := sum(1 for _ in run.glob("jobs/*/*/*")) - len(finished):
        log.info("%s: left out, as not finished: %s", path, counted(unfinished, "job"))
    for job in chosen:
        folder = job.folder(run)
        yield Source(path=str(folder), card=artefact.read_card(folder), job=job)


def served_name(job: Job) -> str:
    """What a job's LoRA is called."""
    return f"{job.task}/{job.seed}/{job.variant}"


def check_kind(source: Source) -> None:
    """Raise `AdapterError` for an adapter that no server takes."""
    family = family_of_sites(source.card.sites)
    reasons = {
        f"its backbone is an encoder-decoder ({family.name}), and vLLM and LoRAX serve LoRAs over "
        "decoder-only ones alone": not family.has_servers,
        f"{source.config.method} scales outputs, and servers take LoRAs alone": source.config.kind
        != "lora",
        "it trained the backbone's weights too": bool(source.card.origin.get("backbone")),
    }
    for reason, applies in reasons.items():
        if applies:
            raise AdapterError(f"{source.path}: cannot be served: {reason}; set format: merged")
    try:
        served_rank(source.config.rank)
    except AdapterError as error:
        raise AdapterError(f"{source.path}: {error}") from error


def loras_of(source: Source) -> list[Lora]:
    """One for each task, or one for a job and for an adapter without tasks of its own."""
    tasks = source.card.task_names if source.has_tasks else (None,)
    if source.job is not None:
        assert len(tasks) == 1
        return [Lora(name=served_name(source.job), source=source, task=tasks[0])]
    folder = Path(source.path).absolute()
    own = folder.parent.name if folder.name == "adapter" else folder.name
    return [Lora(name=task or own, source=source, task=task) for task in tasks]


def _is_wanted(lora: Lora, tasks: set[str]) -> bool:
    """Whether it is of one of the tasks; one without a task of its own always is."""
    task = lora.source.job.task if lora.source.job else lora.task
    return task is None or task in tasks


# -- over what -------------------------------------------------------------------------------------


def one_backbone(config: ExportConfig, loras: Sequence[Lora]) -> Blueprint:
    """The backbone of all; raises `AdapterError` for several, and for one that is no folder."""
    sources = _sources(loras)
    settings = [
        backbone_of(source.path, source.card, config.backbone_moved_to) for source in sources
    ]
    for source, other in zip(sources, settings, strict=True):
        if (other.name, other.config, other.config_seed) != (
            settings[0].name,
            settings[0].config,
            settings[0].config_seed,
        ):
            raise AdapterError(
                f"{sources[0].path} was trained on {settings[0].name or 'random weights'}, "
                f"{source.path} on {other.name or 'other random weights'}: a server has one "
                "backbone; export them into two folders, or set backbone_moved_to if it is the "
                "same one in two places"
            )
    if settings[0].name is None:
        raise AdapterError(
            f"{sources[0].path}: its backbone has random weights, which no server finds; save it "
            "as a folder and set backbone_moved_to"
        )
    blueprint = blueprint_of(sources[0].path, settings[0])
    if blueprint.arrangement.is_part:
        raise AdapterError(
            f"{sources[0].path}: its backbone {settings[0].name} holds other models beside the "
            "text model; convert the backbone (mhr_scale convert) and set backbone_moved_to to "
            "that folder"
        )
    return blueprint


@dataclass(frozen=True, slots=True)
class Linears:
    """What a LoRA is written on: the linears of its layout in all blocks, the ends of their names.

    LoRAX leaves a kind of linear out of an adapter that lacks it in one block.
    """

    sites: tuple[Site, ...]
    ends: list[str]

    def n_bytes(self, rank: int) -> int:
        """What a LoRA of this rank takes once it is padded."""
        widths = sum(site.in_features + site.out_features for site in self.sites)
        return 4 * served_rank(rank) * widths


def served_linears(loras: Sequence[Lora], blueprint: Blueprint) -> dict[str, Linears]:
    """The linears by source; raises `AdapterError` if an adapter does not fit the backbone."""
    with torch.device("meta"):
        model = make_model(blueprint)
    modules = [name for name, _ in model.named_modules()]
    known: dict[Any, Linears] = {}
    found = {}
    for source in _sources(loras):
        key = (source.config.layout, source.config.blocks, source.card.sites)
        if key not in known:
            artefact.check_backbone(Path(source.path), source.card, model)
            sites = find_sites(model, source.config.layout, ALL_BLOCKS)
            known[key] = Linears(sites, ends_of([site.name for site in sites], modules))
        found[source.path] = known[key]
    return found


def _sources(loras: Sequence[Lora]) -> list[Source]:
    return list({lora.source.path: lora.source for lora in loras}.values())


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
    name, revision = str(blueprint.facts["name"]), blueprint.facts.get("revision")
    base = str(Path(name).absolute()) if Path(name).is_dir() else name
    served: list[Served] = []
    known: dict[tuple[str, str], str] = {}
    progress = Progress(len(loras), start=0, what="export", unit="LoRA")
    for lora in loras:
        on = linears[lora.source.path]
        padded = lora.padded(on, lora.original())
        place = f"{LORAS}/{as_folder(lora.name)}"
        written = peft_folders.write_peft_lora(padded, folder / place, base_model=base)
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
        base=base, revision=revision, targets=targets, loras=served, max_loras=config.max_loras
    )
    write_json(folder / MANIFEST, serving.manifest())
    write_text(folder / SCRIPT, serving.script())
    write_text(folder / README, serving.readme(Path(config.folder)))
    write_text(folder / "export.yaml", to_yaml(config))
    return serving


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
