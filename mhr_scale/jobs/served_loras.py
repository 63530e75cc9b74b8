"""Which LoRAs are served over one backbone: those of an adapter's tasks, and of few-shot jobs.

Jobs can be thousands, so their adapters are opened one after the other; all that can be wrong with
them is told by their cards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.collapse import average, collapse
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.padding import pad
from mhr_scale.adapters.sites import Site, family_of_sites
from mhr_scale.backbone.of_adapter import open_adapter
from mhr_scale.config import ExportConfig
from mhr_scale.errors import AdapterError, counted, some, suggest
from mhr_scale.exchange.serving import served_rank
from mhr_scale.jobs.job import Job, check_folders, read_all_results
from mhr_scale.run.runlog import log


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

    def padded(self, linears: Linears, original: Adapter) -> Adapter:
        """What is written, at a rank and on linears that servers take."""
        single = original if self.task is None else collapse(original, self.task)
        return pad(single, rank=served_rank(single.config.rank), sites=linears.sites)

    @property
    def _is_average(self) -> bool:
        """Whether its source has skills, but no routing of tasks."""
        return self.task is None and self.source.config.is_routed


def list_loras(config: ExportConfig) -> list[Lora]:
    """Every LoRA by its name; raises `AdapterError` for what no server takes, and for a clash."""
    sources = [
        source for path in (config.adapter, *config.also) for source in read_sources(path, config)
    ]
    if config.jobs and not any(source.job for source in sources):
        raise AdapterError(
            f"jobs: {some(config.jobs)}, and no run folder of adapt is exported; give one in "
            "`also`, or set jobs=[]"
        )
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
    names = {served_name(job): job for job in finished}
    ends = config.jobs or ("*",)
    chosen = [job for name, job in names.items() if any(_has_end(name, end) for end in ends)]
    for end in ends:
        if not any(_has_end(name, end) for name in names):
            raise AdapterError(f"{path}: jobs: '{end}' is none of {some(names, shown=3)}")
    if unfinished := sum(1 for _ in run.glob("jobs/*/*/*")) - len(finished):
        log.info("%s: left out, as not finished: %s", path, counted(unfinished, "job"))
    for job in chosen:
        folder = job.folder(run)
        yield Source(path=str(folder), card=artefact.read_card(folder), job=job)


def served_name(job: Job) -> str:
    """What a job's LoRA is called."""
    return f"{job.task}/{job.seed}/{job.variant}"


def _has_end(name: str, end: str) -> bool:
    return fnmatchcase(f"/{name}", f"*/{end}")


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


def sources_of(loras: Sequence[Lora]) -> list[Source]:
    """Their adapters, each once."""
    return list({lora.source.path: lora.source for lora in loras}.values())
