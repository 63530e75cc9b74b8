"""The verb `finetune`: an exported LoRA and one few-shot task in, the fine-tuned LoRA out.

Stock parts: transformers loads the backbone, in 4 or 8 bits by bitsandbytes (and leaves T5's `wo`
unquantised); peft loads, trains and writes the LoRA; the optimizer is anybody's. The task's rows,
losses and scores are those of `adapt`. One process, on one GPU or on CPU.

<run folder>/  adapter/       the fine-tuned LoRA as a PEFT folder
               metrics.jsonl  scores_before.jsonl  scores.jsonl  result.json
               steps/000100/  the LoRA and its optimizer, to go on from
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mhr_scale.backbone import fingerprint, quantise
from mhr_scale.backbone.blueprint import Blueprint, read_blueprint
from mhr_scale.backbone.of_adapter import backbone_facts
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    FinetuneConfig,
    ScheduleConfig,
    SelectionConfig,
    ShotsConfig,
    VariantConfig,
)
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import ConfigError, DivergenceError, RunError, did_you_mean
from mhr_scale.exchange import stock
from mhr_scale.jobs.job import RESULT
from mhr_scale.jobs.job_data import JobData, TrainRow, open_data
from mhr_scale.passes import few_shot as passes
from mhr_scale.passes import scoring
from mhr_scale.run import stopping, tracking
from mhr_scale.run.files import to_json_lines, write_json, write_text
from mhr_scale.run.run_folder import check_writable, differences, listed, read_recipe, write_recipe
from mhr_scale.run.runlog import Metrics, Progress, log, record_provenance, world_size
from mhr_scale.run.writer import Writer
from mhr_scale.scores import summary
from mhr_scale.scores.questions import answerers, judge
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.suites import read_few_shot
from mhr_scale.tasks.task import Intake
from mhr_scale.training import checkpoint, optim

BEFORE = "scores_before.jsonl"
#: Settings that may differ when a run goes on: where and how fast, not what.
FREE_TO_CHANGE = ("run.", "micro_batch_size", "scoring.max_tokens", "backbone.recompute")


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """What is read and found good before any weight of the backbone is."""

    source: Path
    blueprint: Blueprint
    tokenizer: Any
    data: JobData
    intake: Intake


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The loaded model and what it runs on."""

    model: Any
    engine: Engine
    tokenizer: Any

    @property
    def base(self) -> Any:
        """The backbone, whose linears have the LoRA inside."""
        return self.model.get_base_model()

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a LoRA on one task; returns the folder of the new one.

    The same command goes on from the last saved step.
    """
    folder = Path(config.run.folder)
    check_alone()
    check_folder(config)
    tracking.check(config.run.trackers)
    if (folder / RESULT).is_file():
        log.info("%s is finished: %s", folder, folder / RESULT)
        return folder / "adapter"
    opening = open_run(config)
    engine = Engine({}, timeout_seconds=60.0)
    open_folder(config, opening, engine.device)
    start = checkpoint.find_whole(folder) or 0
    source = checkpoint.step_folder(folder, start) if start else opening.source
    model = stock.load_model(config.backbone, opening.blueprint, source, engine.device)
    loaded = Loaded(model=model, engine=engine, tokenizer=opening.tokenizer)
    with model.disable_adapter():
        fingerprint.check(loaded.base, opening.blueprint, config.backbone, engine)
    optimizer = stock.make_optimizer(config.optim, loaded.trained, engine.device)
    if start:
        stock.load_optimizer(optimizer, source)
    announce(config, opening, loaded, start=start)
    with stopping.held():
        before = examine(config, opening, loaded, folder / BEFORE)
        train(config, opening, loaded, optimizer, start=start)
        after = examine(config, opening, loaded, folder / summary.SCORES)
    stock.write_peft(model, folder / "adapter", opening.source)
    close(config, opening, loaded, before=before, after=after)
    return folder / "adapter"


# -- at the door -----------------------------------------------------------------------------------


def open_run(config: FinetuneConfig) -> Opening:
    """Read and check the adapter, the backbone's configuration and the task."""
    source = stock.find_peft_lora(config.adapter)
    blueprint = read_blueprint(config.backbone)
    quantise.check(config.backbone, blueprint.model_config)
    stock.check_fit(source, blueprint, config.backbone)
    tokenizer = load_tokenizer(config.backbone, blueprint)
    data, intake = read_data(config, tokenizer)
    return Opening(
        source=source, blueprint=blueprint, tokenizer=tokenizer, data=data, intake=intake
    )


def read_data(config: FinetuneConfig, tokenizer: Any) -> tuple[JobData, Intake]:
    """The rows of the task; raises `ConfigError` if the suite has no such task."""
    tasks = config.tasks.only(config.task)
    shots, seed = config.shots, config.shots.seed
    adaptation = AdaptConfig(
        variants={"finetune": VariantConfig(adapter=config.adapter)},
        tasks=tasks,
        shots=ShotsConfig(seeds=(seed,), count=shots.count, folder=shots.folder),
        protocol=config.protocol,
        selection=SelectionConfig(on="last"),
        scoring=config.scoring,
        run=AdaptRunConfig(folder=config.run.folder),
    )
    examples = config.scoring.examples
    found, intake = read_few_shot(tasks, adaptation.shots, seed=seed, examples=examples)
    named = {few_shot.task.name: few_shot for few_shot in found}
    if config.task not in named:
        hint = did_you_mean(config.task, named)
        raise ConfigError(f"task: suite {tasks.suite} has no task '{config.task}'{hint}")
    return open_data(named[config.task], adaptation, tokenizer), intake


def check_alone() -> None:
    """Raise `ConfigError` if a launcher started several processes."""
    if world_size() > 1:
        raise ConfigError(
            f"finetune is one process, and {world_size()} were started: "
            "python launch/finetune.py RECIPE"
        )


def check_folder(config: FinetuneConfig) -> None:
    """Raise `RunError` if the folder holds a run with other settings."""
    folder = Path(config.run.folder)
    check_writable(folder)
    file = folder / "config.yaml"
    if not file.exists():
        return
    changed = [
        difference
        for key, difference in differences(read_recipe(FinetuneConfig, file), config)
        if not key.startswith(FREE_TO_CHANGE)
    ]
    if changed and (folder / BEFORE).exists():
        raise RunError(
            f"{folder}: holds a run with other settings ({listed(changed)}); use another run.folder"
        )


def open_folder(config: FinetuneConfig, opening: Opening, device: torch.device) -> None:
    """Write what a reader of the run needs before its first number."""
    folder = Path(config.run.folder)
    write_recipe(folder / "config.yaml", config)
    opening.intake.write(folder / "rejects.jsonl")
    record_provenance(
        folder / "provenance.json",
        device=str(device),
        backbone=backbone_facts(config.backbone, opening.blueprint),
        adapter=str(opening.source),
    )


def announce(config: FinetuneConfig, opening: Opening, loaded: Loaded, *, start: int) -> None:
    """Say in plain words what is about to happen."""
    data, weights = opening.data, list(loaded.model.parameters())
    log.info(
        "%s on %s, seed %d: %d training examples, %d to score; %s trainable numbers over %s "
        "(%s, quantise: %s, %.2f GB) on %s; steps %d to %d, %d examples each",
        opening.source,
        config.task,
        config.shots.seed,
        data.few_shot.n_rows,
        len(data.test.questions),
        f"{sum(parameter.numel() for parameter in loaded.trained):,}",
        config.backbone.name,
        config.backbone.dtype,
        config.backbone.quantise,
        sum(weight.numel() * weight.element_size() for weight in weights) / 1e9,
        loaded.engine.device,
        start + 1,
        config.protocol.steps,
        data.batch_size,
    )


# -- training --------------------------------------------------------------------------------------


def train(
    config: FinetuneConfig, opening: Opening, loaded: Loaded, optimizer: Optimizer, *, start: int
) -> None:
    """Train to the last step, logging and saving on the way."""
    protocol, run, folder = config.protocol, config.run, Path(config.run.folder)
    schedule = ScheduleConfig(
        steps=protocol.steps, warmup_fraction=protocol.warmup_fraction, decay=protocol.decay
    )
    tracked = tracking.opened(run.trackers, folder, resume_step=start)
    progress = Progress(protocol.steps, start=start, what="finetune")
    loaded.base.train()
    with Writer() as writer, tracked as track:
        metrics = Metrics(folder / "metrics.jsonl", resume_step=start, also=track)
        for number in range(start, protocol.steps):
            rate = config.optim.lr * optim.rate_factor(schedule, number)
            for group in optimizer.param_groups:
                group["lr"] = rate
            writer.check()
            values = train_step(config, loaded, optimizer, opening.data.batch(number), number)
            step = number + 1
            odd = [name for name, value in values.items() if not math.isfinite(value)]
            if odd:
                way_out = "lower optim.lr, in another run.folder"
                raise DivergenceError(f"step {step}: not finite: {', '.join(odd)}; {way_out}")
            if step == 1 or step % run.log_every == 0 or step == protocol.steps:
                metrics.write({"step": step, **values, "lr": rate})
            is_stopped = stopping.is_asked() and step < protocol.steps
            is_due = bool(run.save_every) and step % run.save_every == 0
            if step == protocol.steps or is_due or is_stopped:
                copy = stock.copy_step(loaded.model, optimizer)
                write = partial(_write_step, metrics, loaded.model, copy, folder, step)
                writer.submit(partial(write, opening.source))
            progress.advance(f"loss {values['loss']:.4f}")
            if is_stopped:
                writer.wait()
                raise stopping.stop(f"step {step} is saved")
    progress.close()


def _write_step(
    metrics: Metrics, model: Any, copy: stock.StepCopy, folder: Path, step: int, source: Path
) -> None:
    """Write a saved step, in the background: of copies, which no step changes."""
    metrics.flush()
    stock.save_step(model, copy, folder, step, source)


def train_step(
    config: FinetuneConfig,
    loaded: Loaded,
    optimizer: Optimizer,
    rows: Sequence[TrainRow],
    number: int,
) -> dict[str, float]:
    """One update; returns the losses and the norm of the gradient before clipping.

    Sums of the parts are divided by the counts of the whole batch: how it is cut does not matter.
    """
    counts, size = passes.count(rows, config.protocol), config.micro_batch_size
    sums: dict[str, Tensor] = {}
    for start in range(0, len(rows), size):
        torch.manual_seed(seed_from("dropout", config.shots.seed, number, start))
        parts = passes.forward(
            config.protocol,
            loaded.base,
            rows[start : start + size],
            lambda name, part: part.sum.sum() / counts[name],
            device=loaded.engine.device,
        )
        parts["loss"].backward()
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.detach()
    limit = config.optim.clip_norm
    norm = nn.utils.clip_grad_norm_(loaded.trained, math.inf if limit is None else limit)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return {name: float(part) for name, part in {**sums, "grad_norm": norm}.items()}


# -- scores ----------------------------------------------------------------------------------------


def examine(config: FinetuneConfig, opening: Opening, loaded: Loaded, file: Path) -> float:
    """Score the task's test rows, unless `file` has their scores already; returns the mean."""
    exam, found = opening.data.test, {}
    if not file.exists():
        options = config.scoring
        runs = answerers(exam.rows, loaded.base, None, loaded.tokenizer, options, loaded.engine)
        progress = Progress(len(exam.rows), start=0, what="evaluate", unit="example")
        for _, run, todo in runs:
            for batch in scoring.fill_batches(todo, options.max_tokens):
                if stopping.is_asked():
                    raise stopping.stop("what was trained is saved, the scores begin again")
                for row, value in zip(batch, run(batch), strict=True):
                    found[row.number] = judge(exam.questions[row.number], value)
                    progress.advance(config.task)
        progress.close()
        lines = [found[number] for number in range(len(exam.rows))]
        write_text(file, to_json_lines(lines))
    scores = summary.read_scores(file)
    if len(scores) != len(exam.rows):
        raise RunError(f"{file}: not the scores of all its rows; delete it and run again")
    return summary.mean_points(scores)


def close(
    config: FinetuneConfig, opening: Opening, loaded: Loaded, *, before: float, after: float
) -> None:
    """Write the result, the last file of a run, and say where everything lies."""
    folder, questions = Path(config.run.folder), opening.data.test.questions
    result = {
        "task": config.task,
        "seed": config.shots.seed,
        "metric": questions[0].metric,
        "examples": len(questions),
        "score_before": before,
        "score": after,
        "steps": config.protocol.steps,
        "trained_numbers": sum(parameter.numel() for parameter in loaded.trained),
    }
    write_json(folder / RESULT, result)
    shutil.rmtree(folder / "steps", ignore_errors=True)
    log.info(
        "\n%s: %s %.2f before, %.2f after %d steps\n  adapter  %s\n  numbers  %s",
        config.task,
        questions[0].metric,
        before,
        after,
        config.protocol.steps,
        folder / "adapter",
        folder / "metrics.jsonl",
    )
