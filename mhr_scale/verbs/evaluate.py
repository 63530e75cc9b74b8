"""The verb `evaluate`: a backbone, with or without an adapter, and tasks in; scores out.

<run folder>/  scores.jsonl   one line per example, written as it is scored, in the end in order
               summary.json   per task, per prompt, means; computed from scores.jsonl alone
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.adapters.artefact import CARD, Card
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.adapters.collapse import soup
from mhr_scale.adapters.library import route_by_token
from mhr_scale.adapters.places import find_place
from mhr_scale.adapters.wrapping import adapters_off
from mhr_scale.backbone.of_adapter import backbone_of, check_fit, open_adapter, open_library
from mhr_scale.config import BackboneConfig, EvaluateConfig
from mhr_scale.engine.opened import OpenedBackbone, PlacedBackbone, open_backbone
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.families.packed import EncodedRow
from mhr_scale.jobs.soup import TaskEmbedder, gather_similar
from mhr_scale.jobs.start import stack
from mhr_scale.passes import scoring
from mhr_scale.run import repositories, stopping
from mhr_scale.run.files import append_text, to_json_lines, write_json, write_text
from mhr_scale.run.run_folder import RECIPE, REJECTS, RunFolder, owned_folder
from mhr_scale.run.runlog import Progress, log, rank
from mhr_scale.run.streams import write_result
from mhr_scale.scores import summary
from mhr_scale.scores.questions import (
    LENGTHS,
    Question,
    answerers,
    ask,
    encode,
    judge,
    keeps_texts,
    longest,
)
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.tasks.task import Example, Intake, Task, digest

#: The folder of the bare backbone's scores beside those of averages.
BARE = "bare"
#: What a rank that judges nothing keeps of an example.
NO_TEXTS = Example(id="", input="", targets=())
#: Settings that may change between two starts of a run: those that do not affect its scores.
FREE = ("run.", "backbone_moved_to", "soup.tasks", "soup.tasks.", "scoring.texts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is scored: an adapter, or a backbone alone, into a folder of its own."""

    config: EvaluateConfig
    folder: RunFolder[EvaluateConfig]
    card: Card | None
    adapter: Adapter | None
    backbone: BackboneConfig
    is_begun: bool
    inputs: dict[str, str]
    """The adapter by its content (`RunFolder.check_inputs`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What all subjects are asked, and what tells its content.

    Texts are there on rank 0, those of `tasks` elsewhere only for a soup.
    """

    tasks: Sequence[Task]
    questions: Sequence[Question]
    rows: Sequence[EncodedRow]
    intake: Intake
    inputs: dict[str, str]


def evaluate(config: EvaluateConfig) -> Path:
    """Score every example of the tasks; returns the folder with scores and summary.

    Under `extra_steps` it has such a folder for every number of them, and one for the backbone.
    Collective. The same command continues an interrupted run.
    """
    configs = [config] if config.extra_steps is None else every_average(config)
    with ExitStack() as owned:
        for part in configs:
            owned.enter_context(owned_folder(part.run.folder))
        return score_subjects(config, [open_subject(part) for part in configs])


def every_average(config: EvaluateConfig) -> list[EvaluateConfig]:
    """A recipe for every number of extra steps, and one for the bare backbone.

    Raises `AdapterError` for a number of steps that the run of `average` does not have.
    """
    found, folder = find_place(str(config.adapter)), Path(config.run.folder)
    run = found.path
    made = {
        int(file.parent.name): found.name_inside(file.parent)
        for file in sorted(run.glob(f"averaged/*/{CARD}"))
        if file.parent.name.isdecimal()
    }
    wanted = list(made) if config.extra_steps == "all" else [*(config.extra_steps or ())]
    missing = [steps for steps in wanted if steps not in made]
    if missing or not made:
        there = ", ".join(map(str, made)) or "none"
        raise AdapterError(
            f"{run}: no average of {', '.join(map(str, missing)) or 'any number of'} extra steps; "
            f"there is {there}; name a run of average, and numbers that its recipe had"
        )
    if (folder / RECIPE).exists():
        raise RunError(f"{folder}: holds a run already; use another run.folder")

    def part(name: str, **changes: Any) -> EvaluateConfig:
        inside = replace(config.run, folder=str(folder / name))
        return replace(config, extra_steps=None, run=inside, **changes)

    parts = [part(f"{steps:06d}", adapter=made[steps]) for steps in sorted(set(wanted))]
    return [*parts, part(BARE, routing="off")]


def open_subject(config: EvaluateConfig) -> Subject:
    """Check the folder of a subject and read its adapter."""
    folder = RunFolder(config.run.folder, EvaluateConfig, free=FREE)
    is_begun = (folder.path / summary.SCORES).exists()
    folder.check(config, is_begun=is_begun, holds="scores", way_out="use another run.folder")
    card, adapter, backbone = open_adapter_of(config)
    inputs = repositories.commits(config.adapter)
    if adapter is not None:
        inputs[f"adapter {repositories.name_of(str(config.adapter))}"] = artefact.digest(adapter)
    return Subject(
        config=config,
        folder=folder,
        card=card,
        adapter=adapter,
        backbone=backbone,
        is_begun=is_begun,
        inputs=inputs,
    )


def score_subjects(config: EvaluateConfig, subjects: Sequence[Subject]) -> Path:
    """Score what has no score yet, in folders that this launch owns. Collective."""
    first = subjects[0]
    opened = open_backbone(
        first.backbone,
        ds_config=config.run.ds_config,
        timeout_seconds=config.run.timeout_seconds,
        deterministic=config.run.deterministic,
        recipe=config,
        adapter=config.adapter,
    )
    opened.check_packing(config.scoring.packing, "scoring.packing")
    for subject in subjects:
        if subject.card is not None:
            check_fit(str(subject.config.adapter), subject.card, opened.blueprint)
    asked = read_questions(config, first.adapter, opened)
    opened.check_length(*longest(asked.rows, config.scoring), LENGTHS)
    for subject in subjects:
        inputs = asked.inputs | subject.inputs
        subject.folder.check_inputs(inputs, is_begun=subject.is_begun, holds="scores")
    with opened.placed(() if first.adapter is None else first.adapter.sites) as placed:
        placed.model.eval()
        summaries = [score_subject(subject, placed, opened, asked) for subject in subjects]
        if placed.engine.rank == 0 and len(subjects) == 1:
            write_result(summary.table(summaries[0]))
        elif placed.engine.rank == 0:
            names = [subject.folder.path.name for subject in subjects]
            heads = [name if name == BARE else f"k = {int(name)}" for name in names]
            columns = dict(zip(heads, summaries, strict=True))
            write_result(summary.side_by_side(columns))
        placed.engine.gather_barrier()
    return Path(config.run.folder)


def read_questions(
    config: EvaluateConfig, adapter: Adapter | None, opened: OpenedBackbone
) -> Asked:
    """Read the tasks and tokenise their questions; rank 0, which judges, keeps the texts.

    For a soup every rank keeps those of the tasks, which are embedded.
    """
    tasks, intake = read_evaluation(config.tasks, examples=config.scoring.examples)
    questions = [question for task in tasks for question in ask(task, config.scoring)]
    numbers = adapter_tasks(adapter, tasks, config)
    rows = encode(tasks, questions, numbers, opened.tokenizer, opened.family, config.scoring)
    inputs = opened.inputs | {f"rows of {task.name}": digest(task.test) for task in tasks}
    if rank() != 0:
        questions = [replace(question, example=NO_TEXTS) for question in questions]
        tasks = tasks if config.routing == "soup" else []
    return Asked(tasks=tasks, questions=questions, rows=rows, intake=intake, inputs=inputs)


def score_subject(
    subject: Subject, placed: PlacedBackbone, opened: OpenedBackbone, asked: Asked
) -> dict[str, Any]:
    """Score one subject's missing examples; returns its summary, empty on other ranks than 0.

    Collective.
    """
    config, folder, adapter = subject.config, subject.folder, subject.adapter
    engine, inputs = placed.engine, asked.inputs | subject.inputs
    if adapter is not None:
        if config.routing == "soup":
            adapter = soup_of_every_task(config, adapter, asked.tasks, placed, opened.tokenizer)
            soups = {"soups of similar tasks": artefact.digest(adapter)}
            folder.check_inputs(soups, is_begun=subject.is_begun, holds="scores")
            inputs |= soups
        adapter.bind(placed.adapted)
    if engine.rank == 0:
        folder.keep_recipe(config)
        folder.keep_inputs(inputs, is_begun=subject.is_begun)
        asked.intake.write(folder.path / REJECTS)
        precision = None if subject.card is None else subject.card.precision
        folder.record_start(
            **engine.facts,
            backbone=opened.facts,
            adapter=config.adapter and repositories.last_found(config.adapter).facts,
            stored_precision=precision,
            packing=placed.lays_flat(config.scoring.packing, "scoring.packing"),
        )
    engine.gather_barrier()
    bare = adapters_off(placed.model) if adapter is None else nullcontext()
    with stopping.held(), bare:
        score_rows(config, placed, adapter, opened.tokenizer, asked.questions, asked.rows)
    if engine.rank != 0:
        return {}
    scores = folder.path / summary.SCORES
    summarised = summary.summarise(summary.read_scores(scores))
    write_json(folder.path / "summary.json", summarised)
    log.info("scores in %s", scores)
    return summarised


def score_rows(
    config: EvaluateConfig,
    placed: PlacedBackbone,
    adapter: Adapter | None,
    tokenizer: Any,
    questions: Sequence[Question],
    rows: Sequence[EncodedRow],
) -> None:
    """Score the questions without a score, ranked ones first; rank 0 appends to the file.

    Collective.
    """
    engine, path = placed.engine, Path(config.run.folder) / summary.SCORES
    if engine.rank == 0:
        keep_whole_lines(path)
    done = engine.broadcast_object(
        {score["id"] for score in summary.read_scores(path)} if engine.rank == 0 else None
    )
    options = config.scoring
    with_texts = keeps_texts(options, len(questions))
    pending = [row for row in rows if questions[row.number].id not in done]
    progress = Progress(len(rows), start=len(done), what="evaluate", unit="example")
    for way in answerers(pending, placed, adapter, tokenizer, options):
        for results in scoring.score(way.batches, way.run, engine=engine):
            if engine.rank == 0:
                lines = [
                    judge(questions[number], value, with_texts=with_texts)
                    for number, value in sorted(results.items())
                ]
                append_text(path, to_json_lines(lines))
                for line in lines:
                    progress.advance(line["task"])
    progress.close()
    if engine.rank == 0:
        put_in_order(path, questions)


def put_in_order(path: Path, questions: Sequence[Question]) -> None:
    """Sort the scores by their questions, whatever the ranks and starts that wrote them."""
    scores = summary.read_scores(path)
    places = {question.id: place for place, question in enumerate(questions)}
    ordered = sorted(scores, key=lambda score: places.get(score["id"], len(places)))
    if ordered != scores:
        write_text(path, to_json_lines(ordered))


def open_adapter_of(
    config: EvaluateConfig,
) -> tuple[Card | None, Adapter | None, BackboneConfig]:
    """The adapter (as stored, or averaged) and its backbone; no adapter with a bare backbone."""
    if config.adapter is None:
        assert config.backbone is not None
        return None, None, config.backbone
    is_library = config.routing == "arrow"
    opening = open_library if is_library else open_adapter
    card, stored = opening(config.adapter, config.backbone_moved_to)
    if is_library:
        arrow = config.arrow
        stored = route_by_token(stored, top_k=arrow.top_k, temperature=arrow.temperature)
    backbone = backbone_of(
        config.adapter,
        card,
        config.backbone_moved_to,
        dtype=config.backbone_dtype,
        quantise=config.backbone_quantise,
    )
    if config.routing == "off":
        return card, None, backbone
    return card, mean_of(stored) if config.routing == "average" else stored, backbone


def soup_of_every_task(
    config: EvaluateConfig,
    stored: Adapter,
    tasks: Sequence[Task],
    placed: PlacedBackbone,
    tokenizer: Any,
) -> Adapter:
    """One adapter with a soup for each task: the mean of those of similar training tasks."""
    embedder = TaskEmbedder(
        placed=placed,
        tokenizer=tokenizer,
        lengths=config.scoring.lengths,
    )
    by_input = {task.name: replace(task, train=task.test) for task in tasks}
    similar = gather_similar(
        str(config.adapter), stored.task_names, by_input, config.soup, embedder
    )
    for task, names in similar.items():
        log.info("soup of %s: %s", task, ", ".join(names))
    soups = [soup(stored, names) for names in similar.values()]
    return stack(list(similar), soups, routing_only=False)


def adapter_tasks(
    stored: Adapter | None, tasks: Sequence[Task], config: EvaluateConfig
) -> dict[str, int]:
    """The adapter's number for every task; 0 where all tasks share one slot."""
    if config.routing == "soup":
        assert stored is not None
        if not stored.config.private or stored.config.is_routed:
            raise AdapterError(
                f"{config.adapter}: a soup is made of private adapters, this is "
                f"{stored.config.method}; set routing: average"
            )
        return {task.name: number for number, task in enumerate(tasks)}
    routes_tasks = stored is not None and (stored.config.has_logits or stored.config.private)
    if stored is None or not routes_tasks or config.routing == "arrow":
        return dict.fromkeys((task.name for task in tasks), 0)
    unknown = [task.name for task in tasks if task.name not in stored.task_names]
    if unknown:
        raise AdapterError(
            f"{config.adapter}: has no routing for {len(unknown)} task(s), such as {unknown[0]}; "
            "set routing: average"
        )
    return {task.name: stored.task_names.index(task.name) for task in tasks}


def keep_whole_lines(path: Path) -> None:
    """Cut off a last line that was left incomplete when the run was stopped."""
    if path.exists():
        summary.read_scores(path)  # raises for any other damage, which is not ours to repair
        text = path.read_bytes().decode("utf-8", errors="replace")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            write_text(path, complete)
