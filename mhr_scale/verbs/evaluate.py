"""The verb `evaluate`: a backbone, with or without an adapter, and tasks in; scores out.

<run folder>/  scores.jsonl   one line per example, written as it is scored
               summary.json   per task, per prompt, means; computed from scores.jsonl alone
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.adapters.collapse import soup
from mhr_scale.backbone.of_adapter import backbone_of, check_fit, open_adapter
from mhr_scale.config import BackboneConfig, EvaluateConfig
from mhr_scale.engine.opened import PlacedBackbone, open_backbone
from mhr_scale.errors import AdapterError
from mhr_scale.families.packed import EncodedRow
from mhr_scale.jobs.soup import TaskEmbedder, gather_similar
from mhr_scale.jobs.start import stack
from mhr_scale.passes import scoring
from mhr_scale.run import stopping
from mhr_scale.run.files import to_json_lines, write_json, write_text
from mhr_scale.run.run_folder import REJECTS, RunFolder
from mhr_scale.run.runlog import Progress, log
from mhr_scale.scores import summary
from mhr_scale.scores.questions import Question, answerers, ask, encode, judge
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.tasks.task import Task

#: Settings that may change between two starts of a run: those that do not affect its scores.
FREE = ("run.", "backbone_moved_to")


def evaluate(config: EvaluateConfig) -> Path:
    """Score every example of the tasks; returns the folder with scores and summary.

    Collective. The same command continues an interrupted run.
    """
    folder = RunFolder(config.run.folder, EvaluateConfig, free=FREE)
    scores = folder.path / summary.SCORES
    folder.check(config, is_begun=scores.exists(), holds="scores", way_out="use another run.folder")
    card, adapter, backbone_config = open_adapter_of(config)
    opened = open_backbone(
        backbone_config,
        ds_config=config.run.ds_config,
        timeout_seconds=config.run.timeout_seconds,
        adapter=config.adapter,
    )
    if card is not None:
        check_fit(str(config.adapter), card, opened.blueprint)
    tasks, intake = read_evaluation(config.tasks, examples=config.scoring.examples)
    questions = [question for task in tasks for question in ask(task, config.scoring)]
    numbers = adapter_tasks(adapter, tasks, config)
    rows = encode(tasks, questions, numbers, opened.tokenizer, opened.family, config.scoring)
    with opened.placed(() if adapter is None else adapter.sites) as placed:
        placed.model.eval()
        engine = placed.engine
        if adapter is not None:
            if config.routing == "soup":
                adapter = soup_of_every_task(config, adapter, tasks, placed, opened.tokenizer)
            adapter.bind(placed.adapted)
        if engine.rank == 0:
            folder.keep_recipe(config)
            intake.write(folder.path / REJECTS)
            precision = None if card is None else card.precision
            folder.record_start(**engine.facts, backbone=opened.facts, stored_precision=precision)
        engine.gather_barrier()
        with stopping.held():
            score_rows(config, placed, adapter, opened.tokenizer, questions, rows)
        if engine.rank == 0:
            summarised = summary.summarise(summary.read_scores(scores))
            write_json(folder.path / "summary.json", summarised)
            log.info("\n%s\n  scores   %s", summary.table(summarised), scores)
        engine.gather_barrier()
    return folder.path


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
    pending = [row for row in rows if questions[row.number].id not in done]
    progress = Progress(len(rows), start=len(done), what="evaluate", unit="example")
    for _, run, group in answerers(pending, placed, adapter, tokenizer, options):
        for results in scoring.score(group, run, engine=engine, max_tokens=options.max_tokens):
            if engine.rank == 0:
                lines = [judge(questions[n], value) for n, value in sorted(results.items())]
                with path.open("a", encoding="utf-8") as file:
                    file.write(to_json_lines(lines))
                for line in lines:
                    progress.advance(line["task"])
    progress.close()


def open_adapter_of(
    config: EvaluateConfig,
) -> tuple[Card | None, Adapter | None, BackboneConfig]:
    """The adapter (as stored, or averaged) and its backbone; no adapter with a bare backbone."""
    if config.adapter is None:
        assert config.backbone is not None
        return None, None, config.backbone
    card, stored = open_adapter(config.adapter, config.backbone_moved_to)
    backbone = backbone_of(
        config.adapter,
        card,
        config.backbone_moved_to,
        dtype=config.backbone_dtype,
        quantise=config.backbone_quantise,
    )
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
        max_input_tokens=config.scoring.max_input_tokens,
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
    if stored is None or not (stored.config.has_logits or stored.config.private):
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
