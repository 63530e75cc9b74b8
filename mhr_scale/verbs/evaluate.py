"""The verb `evaluate`: a backbone, with or without an adapter, and tasks in; scores out.

<run folder>/  scores.jsonl   one line per example, written as it is scored
               summary.json   per task, per prompt, means; made from scores.jsonl alone
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mhr_scale import backbone, scoring, summary
from mhr_scale.adapters import Adapter, attach, state
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.config import BackboneConfig, BatchConfig, EvaluateConfig
from mhr_scale.encode import Encoder
from mhr_scale.engine import Engine, read_ds_config
from mhr_scale.errors import AdapterError, DataError, RunError
from mhr_scale.recipe import load, to_yaml
from mhr_scale.runlog import Progress, log, record_provenance, write_json, write_text
from mhr_scale.scoring import ChoiceRow
from mhr_scale.tasks import metrics
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.tasks.task import Example, Task


@dataclass(frozen=True, slots=True)
class Question:
    """One example to score: its global id, its task, the metric that counts."""

    id: str
    task: str
    metric: str
    example: Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is evaluated: the prepared model and, unless it is bare, its adapter."""

    engine: Engine
    model: torch.nn.Module
    adapter: Adapter | None
    tokenizer: Any


def evaluate(config: EvaluateConfig) -> Path:
    """Score every example of the tasks; returns the folder with scores and summary.

    Collective. The same command goes on with an interrupted job.
    """
    folder = Path(config.run.folder)
    ds_content = read_ds_config(config.run.ds_config)
    check_folder(config)
    stored = load_adapter(config)
    backbone_config = backbone_of(config)
    blueprint = backbone.read_blueprint(backbone_config)
    check_fit(config, blueprint)
    tokenizer = backbone.load_tokenizer(backbone_config, blueprint)
    tasks, intake = read_evaluation(config.tasks, examples=config.scoring.examples)
    questions = [question for task in tasks for question in ask(task, config)]
    numbers = adapter_tasks(stored, tasks, config)
    rows = encode(tasks, questions, numbers, tokenizer, config)
    engine = Engine(ds_content, timeout_seconds=config.run.timeout_seconds)
    try:
        model = engine.build(backbone_config, blueprint)
        adapter = None
        if stored is not None:
            adapter = attach(model, stored.config, tasks=stored.task_names)
            state.load_tensors(adapter, state.named_tensors(stored), place=str(config.adapter))
        model = engine.prepare(model, backbone_config).eval()
        if engine.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.yaml", to_yaml(config))
            intake.write(folder / "rejects.jsonl")
            record_provenance(
                folder / "provenance.json",
                world_size=engine.world_size,
                placement=engine.placement,
                backbone=blueprint.facts,
            )
        engine.gather_barrier()
        subject = Subject(engine=engine, model=model, adapter=adapter, tokenizer=tokenizer)
        run_job(config, subject, questions, rows)
        if engine.rank == 0:
            found = summary.summarise(summary.read_scores(folder / summary.SCORES))
            write_json(folder / "summary.json", found)
            log.info("\n%s\n  scores   %s", summary.table(found), folder / summary.SCORES)
        engine.gather_barrier()
    finally:
        engine.close()
    return folder


def run_job(
    config: EvaluateConfig,
    subject: Subject,
    questions: Sequence[Question],
    rows: Sequence[ChoiceRow],
) -> None:
    """Score what is not scored yet, ranked questions first; rank 0 appends line by line."""
    engine, path = subject.engine, Path(config.run.folder) / summary.SCORES
    done = engine.broadcast_object(
        {score["id"] for score in summary.read_scores(path)} if engine.rank == 0 else None
    )
    if engine.rank == 0:
        keep_whole_lines(path)
    options = config.scoring
    device = engine.device
    ways: tuple[tuple[bool, Callable[[list[ChoiceRow]], list[Any]]], ...] = (
        (
            True,
            partial(
                scoring.rank_choices,
                subject.model,
                subject.adapter,
                length_norm=options.length_norm,
                device=device,
            ),
        ),
        (
            False,
            partial(
                scoring.generate_answers,
                subject.model,
                subject.adapter,
                tokenizer=subject.tokenizer,
                beams=options.beams,
                max_new_tokens=options.max_new_tokens,
                synced=engine.is_sharded,
                device=device,
            ),
        ),
    )
    progress = Progress(len(rows), start=len(done), what="evaluate", unit="example")
    for ranks, run in ways:
        todo = [row for row in rows if bool(row.choices) == ranks]
        todo = [row for row in todo if questions[row.number].id not in done]
        for results in scoring.score(todo, run, engine=engine, max_tokens=options.max_tokens):
            if engine.rank == 0:
                lines = [judge(questions[n], value) for n, value in sorted(results.items())]
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(line) + "\n" for line in lines))
                for line in lines:
                    progress.advance(line["task"])
    progress.close()


def judge(question: Question, value: Any) -> dict[str, Any]:
    """One line of scores.jsonl from the choice scores or the generated text of a question."""
    example = question.example
    line = {
        "id": question.id,
        "task": question.task,
        "example": example.id,
        "prompt": example.id.partition("/")[2],
        "metric": question.metric,
    }
    if question.metric == "accuracy":
        label = example.label
        assert label is not None
        found = {"choice_scores": value, "prediction": metrics.best_choice(value), "label": label}
        return {**line, **found, "points": metrics.accuracy(value, label)}
    points = metrics.TEXT_METRICS[question.metric](value, example.targets)
    return {**line, "prediction": value, "references": list(example.targets), "points": points}


def ask(task: Task, config: EvaluateConfig) -> list[Question]:
    """The questions of a task under its metric; raises `DataError` where they cannot be asked."""
    metric = config.scoring.metric or task.metric
    questions = []
    for example in task.test:
        if metric == "accuracy":
            if not example.choices:
                raise DataError(
                    f"task {task.name}: example {example.id} has no choices to rank; set "
                    "scoring.metric to rougeL or exact_match, or give choices"
                )
            if example.label is None or not 0 <= example.label < len(example.choices):
                raise DataError(
                    f"task {task.name}: example {example.id} has label {example.label} for "
                    f"{len(example.choices)} choices; hidden labels cannot be scored"
                )
        questions.append(Question(f"{task.name}/{example.id}", task.name, metric, example))
    return questions


def encode(
    tasks: Sequence[Task],
    questions: Sequence[Question],
    numbers: dict[str, int],
    tokenizer: Any,
    config: EvaluateConfig,
) -> list[ChoiceRow]:
    """Token ids of every question, in their order; choices only where they are ranked."""
    lengths = BatchConfig(
        max_input_tokens=config.scoring.max_input_tokens,
        max_target_tokens=config.scoring.max_choice_tokens,
    )
    rows: list[ChoiceRow] = []
    for task in tasks:
        encoder = Encoder(task, tokenizer, lengths)
        for encoded in encoder.rows(task.test):
            question = questions[len(rows)]
            ranked = question.example.choices if question.metric == "accuracy" else ()
            choices = tuple(encoder.answers(ranked))
            rows.append(ChoiceRow(len(rows), numbers[task.name], encoded.input_ids, choices))
        if encoder.cuts.inputs:
            log.info("task %s: %d inputs cut", task.name, encoder.cuts.inputs)
    return rows


def load_adapter(config: EvaluateConfig) -> Adapter | None:
    """The adapter as it is stored, or its average; None for a bare backbone."""
    if config.adapter is None:
        return None
    stored = state.load(config.adapter)
    return mean_of(stored) if config.routing == "average" else stored


def backbone_of(config: EvaluateConfig) -> BackboneConfig:
    """The bare backbone of the recipe, or the one the adapter was trained on."""
    if config.adapter is None:
        assert config.backbone is not None
        return config.backbone
    facts = state.read_card(config.adapter).backbone
    known = {item.name for item in fields(BackboneConfig)}
    settings = {key: value for key, value in facts.items() if key in known}
    if config.backbone_moved_to is not None:
        settings["name"] = config.backbone_moved_to
    if not settings.get("name") and not settings.get("config"):
        raise AdapterError(
            f"{config.adapter}: does not say which backbone it was trained on; set "
            "backbone_moved_to"
        )
    return BackboneConfig(**settings)


def check_fit(config: EvaluateConfig, blueprint: backbone.Blueprint) -> None:
    """Raise `AdapterError` if the adapter was made for another backbone; no weight is read."""
    if config.adapter is None:
        return
    with torch.device("meta"):
        model = backbone.make_model(blueprint)
    state.check_backbone(state.find(config.adapter), state.read_card(config.adapter), model)


def adapter_tasks(
    stored: Adapter | None, tasks: Sequence[Task], config: EvaluateConfig
) -> dict[str, int]:
    """The adapter's number for every task; 0 where all tasks share one slot."""
    if stored is None or not (stored.config.has_logits or stored.config.private):
        return dict.fromkeys((task.name for task in tasks), 0)
    foreign = [task.name for task in tasks if task.name not in stored.task_names]
    if foreign:
        raise AdapterError(
            f"{config.adapter}: has no routing for {len(foreign)} task(s), such as {foreign[0]}; "
            "set routing: average"
        )
    return {task.name: stored.task_names.index(task.name) for task in tasks}


def check_folder(config: EvaluateConfig) -> None:
    """Raise `RunError` if the folder holds scores of another job."""
    folder = Path(config.run.folder)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.folder: {folder} is a file; name a folder")
    if not (folder / summary.SCORES).exists():
        return
    before = load(EvaluateConfig, folder / "config.yaml")
    parts = ("adapter", "backbone", "routing", "tasks", "scoring")
    changed = [name for name in parts if getattr(before, name) != getattr(config, name)]
    if changed:
        raise RunError(
            f"{folder}: holds scores of another job (other {', '.join(changed)}); use another "
            "run.folder"
        )


def keep_whole_lines(path: Path) -> None:
    """Cut off a line that was being written when the job was stopped."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(path, whole)
