"""The verb `evaluate`: a backbone, with or without an adapter, and tasks in; scores out.

<run folder>/  scores.jsonl   one line per example, written as it is scored
               summary.json   per task, per prompt, means; made from scores.jsonl alone
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.adapters.collapse import soup
from mhr_scale.adapters.methods import wrap
from mhr_scale.adapters.peft_folders import open_adapter
from mhr_scale.backbone import fingerprint
from mhr_scale.backbone.of_adapter import backbone_facts, backbone_of, blueprint_of, check_fit
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import BackboneConfig, EvaluateConfig
from mhr_scale.engine.ds_config import check_quantise, read_ds_config
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.jobs.soup import Kitchen, gather_similar
from mhr_scale.jobs.start import stack
from mhr_scale.passes import scoring
from mhr_scale.passes.scoring import ChoiceRow
from mhr_scale.run import stopping
from mhr_scale.run.files import to_json_lines, write_json, write_text
from mhr_scale.run.run_folder import check_writable, differences, listed, read_recipe, write_recipe
from mhr_scale.run.runlog import Progress, log, record_provenance
from mhr_scale.scores import summary
from mhr_scale.scores.questions import Question, answerers, ask, encode, judge
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.tasks.task import Task

#: Settings that may differ when a job goes on: where, not what.
FREE_TO_CHANGE = ("run.", "backbone_moved_to")


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
    card, stored, backbone_config = open_subject(config)
    blueprint = blueprint_of(config.adapter, backbone_config)
    check_quantise(backbone_config, blueprint, ds_content, config.run.ds_config)
    if card is not None:
        check_fit(str(config.adapter), card, blueprint)
    tokenizer = load_tokenizer(backbone_config, blueprint)
    tasks, intake = read_evaluation(config.tasks, examples=config.scoring.examples)
    questions = [question for task in tasks for question in ask(task, config.scoring)]
    numbers = adapter_tasks(stored, tasks, config)
    rows = encode(tasks, questions, numbers, tokenizer, config.scoring)
    engine = Engine(ds_content, timeout_seconds=config.run.timeout_seconds)
    try:
        model = engine.build(backbone_config, blueprint)
        linears = {} if stored is None else wrap(model, stored.sites)
        model = engine.prepare(model, backbone_config).eval()
        fingerprint.check(model, blueprint, backbone_config, engine)
        if stored is not None:
            if config.routing == "soup":
                kitchen = Kitchen(
                    engine=engine,
                    model=model,
                    linears=linears,
                    tokenizer=tokenizer,
                    max_input_tokens=config.scoring.max_input_tokens,
                )
                stored = soup_of_every_task(config, stored, tasks, kitchen)
            stored.bind(linears)
        if engine.rank == 0:
            write_recipe(folder / "config.yaml", config)
            intake.write(folder / "rejects.jsonl")
            record_provenance(
                folder / "provenance.json",
                world_size=engine.world_size,
                placement=engine.placement,
                backbone=backbone_facts(backbone_config, blueprint),
            )
        engine.gather_barrier()
        subject = Subject(engine=engine, model=model, adapter=stored, tokenizer=tokenizer)
        with stopping.held():
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
    if engine.rank == 0:
        keep_whole_lines(path)
    done = engine.broadcast_object(
        {score["id"] for score in summary.read_scores(path)} if engine.rank == 0 else None
    )
    options = config.scoring
    left = [row for row in rows if questions[row.number].id not in done]
    runs = answerers(left, subject.model, subject.adapter, subject.tokenizer, options, engine)
    progress = Progress(len(rows), start=len(done), what="evaluate", unit="example")
    for _, run, todo in runs:
        for results in scoring.score(todo, run, engine=engine, max_tokens=options.max_tokens):
            if engine.rank == 0:
                lines = [judge(questions[n], value) for n, value in sorted(results.items())]
                with path.open("a", encoding="utf-8") as file:
                    file.write(to_json_lines(lines))
                for line in lines:
                    progress.advance(line["task"])
    progress.close()


def open_subject(config: EvaluateConfig) -> tuple[Card | None, Adapter | None, BackboneConfig]:
    """The adapter as it is stored, or its average, and its backbone; None and a bare backbone."""
    if config.adapter is None:
        assert config.backbone is not None
        return None, None, config.backbone
    card, stored = open_adapter(config.adapter)
    own = backbone_of(
        config.adapter,
        card,
        config.backbone_moved_to,
        dtype=config.backbone_dtype,
        quantise=config.backbone_quantise,
    )
    return card, mean_of(stored) if config.routing == "average" else stored, own


def soup_of_every_task(
    config: EvaluateConfig, stored: Adapter, tasks: Sequence[Task], kitchen: Kitchen
) -> Adapter:
    """One adapter with a soup for each task, made of training tasks with similar inputs."""
    by_input = {task.name: replace(task, train=task.test) for task in tasks}
    similar = gather_similar(str(config.adapter), stored.task_names, by_input, config.soup, kitchen)
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
    foreign = [task.name for task in tasks if task.name not in stored.task_names]
    if foreign:
        raise AdapterError(
            f"{config.adapter}: has no routing for {len(foreign)} task(s), such as {foreign[0]}; "
            "set routing: average"
        )
    return {task.name: stored.task_names.index(task.name) for task in tasks}


def check_folder(config: EvaluateConfig) -> None:
    """Raise `RunError` if the folder holds scores of other settings."""
    folder = Path(config.run.folder)
    check_writable(folder)
    if not (folder / summary.SCORES).exists():
        return
    before = read_recipe(EvaluateConfig, folder / "config.yaml")
    changed = [
        difference
        for key, difference in differences(before, config)
        if not key.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise RunError(
            f"{folder}: holds scores of other settings ({listed(changed)}); use another run.folder"
        )


def keep_whole_lines(path: Path) -> None:
    """Cut off a line that was being written when the job was stopped."""
    if path.exists():
        summary.read_scores(path)  # whose line is no score is the user's to mend
        text = path.read_bytes().decode("utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(path, whole)
