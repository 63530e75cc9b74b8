"""The verb `finetune`: an exported LoRA and one few-shot task in, the fine-tuned LoRA out.

Stock parts: transformers loads the backbone, in 4 or 8 bits by bitsandbytes (and leaves T5's `wo`
unquantised); PEFT loads, trains and writes the LoRA; the optimizer is a stock one. The task's rows,
losses and scores are those of `adapt`. One process, on one GPU or on the CPU.

<run folder>/  adapter/       the fine-tuned LoRA as a PEFT folder
               metrics.jsonl  scores_before.jsonl  scores.jsonl  result.json
               steps/000100/  the LoRA and its optimizer state, to resume from
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

from mhr_scale.adapters.wrapping import AdaptedModel
from mhr_scale.backbone.of_adapter import backbone_facts
from mhr_scale.config import (
    FinetuneConfig,
    ScheduleConfig,
    precision_of,
)
from mhr_scale.engine import determinism
from mhr_scale.engine.check_backbone import check_backbone
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import ConfigError, DivergenceError, RunError
from mhr_scale.exchange import stock
from mhr_scale.families.packed import EncodedRow
from mhr_scale.jobs.finetune_inputs import FinetuneInputs, open_inputs
from mhr_scale.jobs.job import RESULT
from mhr_scale.passes import few_shot_loss
from mhr_scale.run import stopping, tracking
from mhr_scale.run.files import as_size, to_json_lines, write_json, write_text
from mhr_scale.run.run_folder import REJECTS, RunFolder, owned_folder
from mhr_scale.run.runlog import Metrics, Progress, RecentSteps, log, world_size
from mhr_scale.run.streams import write_result
from mhr_scale.run.trackers import Curves
from mhr_scale.run.tracking import Tracking
from mhr_scale.run.writer import Writer
from mhr_scale.scores import summary
from mhr_scale.scores.questions import answerers, judge, keeps_texts
from mhr_scale.seeds import seed_from
from mhr_scale.tasks import metrics
from mhr_scale.training import optim, saved_steps

BEFORE = "scores_before.jsonl"
#: Settings that may change between two starts of a run: those that do not affect its result.
FREE = (
    "run.",
    "micro_batch_size",
    "scoring.max_tokens",
    "scoring.texts",
    "backbone.mapped",
    "backbone.recompute",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """The PEFT model, and its backbone placed for passes; the LoRA is inside its linears."""

    model: Any
    placed: PlacedBackbone
    tokenizer: Any

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a LoRA on one task; returns the folder of the new one.

    The same command resumes from the last saved step.
    """
    if world_size() > 1:
        raise ConfigError(
            f"finetune is one process, and {world_size()} were started: mhr_scale finetune RECIPE"
        )
    with owned_folder(config.run.folder), determinism.switched(config.run.deterministic):
        return finetune_one(config)


def finetune_one(config: FinetuneConfig) -> Path:
    """Fine-tune a LoRA on one task, in a folder that this process owns."""
    folder = RunFolder(config.run.folder, FinetuneConfig, free=FREE, last=RESULT)
    path = folder.path
    is_begun = (path / BEFORE).exists() or folder.is_complete
    folder.check(config, is_begun=is_begun, holds="a run", way_out="use another run.folder")
    tracking.check(config.run.trackers)
    inputs = open_inputs(config)
    folder.check_inputs(inputs.contents, is_begun=is_begun, holds="a run")
    if folder.is_complete:
        write_result(f"{path} is finished: {path / RESULT}\n")
        return path / "adapter"
    engine = Engine({}, timeout_seconds=60.0)
    begin(folder, config, inputs, engine.device, is_begun=is_begun)
    start = saved_steps.find_whole(path) or 0
    source = saved_steps.step_folder(path, start) if start else inputs.source
    loaded = load(config, inputs, engine, source)
    optimizer = stock.make_optimizer(config.optim, loaded.trained, engine.device)
    if start:
        stock.load_optimizer(optimizer, source)
    announce(config, inputs, loaded, start=start)
    with stopping.held():
        before = evaluate(config, inputs, loaded, path / BEFORE)
        train(config, inputs, loaded, optimizer, start=start)
        after = evaluate(config, inputs, loaded, path / summary.SCORES)
    stock.write_peft(loaded.model, path / "adapter", inputs.source)
    close(config, inputs, loaded, before=before, after=after)
    return path / "adapter"


def load(
    config: FinetuneConfig, inputs: FinetuneInputs, engine: Engine, source: Path
) -> LoadedModel:
    """Load the backbone and its LoRA with stock parts; check the bare backbone's fingerprint."""
    blueprint = inputs.blueprint
    model = stock.load_model(inputs.backbone, blueprint, source, engine.device)
    base = model.get_base_model()
    with model.disable_adapter():
        check_backbone(base, blueprint, inputs.backbone, engine)
    placed = PlacedBackbone(
        engine=engine, family=blueprint.family, model=base, adapted=AdaptedModel(base, {})
    )
    return LoadedModel(model=model, placed=placed, tokenizer=inputs.tokenizer)


def begin(
    folder: RunFolder[FinetuneConfig],
    config: FinetuneConfig,
    inputs: FinetuneInputs,
    device: torch.device,
    *,
    is_begun: bool,
) -> None:
    """Write the recipe, the refused rows and the provenance of this start."""
    folder.keep_recipe(config)
    folder.keep_inputs(inputs.contents, is_begun=is_begun)
    inputs.intake.write(folder.path / REJECTS)
    folder.record_start(
        device=str(device),
        deterministic=config.run.deterministic,
        backbone=backbone_facts(inputs.backbone, inputs.blueprint),
        adapter=str(inputs.source),
        stored_precision=inputs.card.precision,
    )


def announce(
    config: FinetuneConfig, inputs: FinetuneInputs, loaded: LoadedModel, *, start: int
) -> None:
    """Log what is about to happen."""
    data, weights = inputs.data, list(loaded.model.parameters())
    log.info(
        "%s on %s, seed %d: %d training examples, %d to score; %s trainable numbers over %s "
        "(%s, %s) on %s; steps %d to %d, %d examples each",
        inputs.source,
        config.task,
        config.shots.seed,
        data.few_shot.n_rows,
        len(data.test.questions),
        f"{sum(parameter.numel() for parameter in loaded.trained):,}",
        inputs.backbone.name,
        precision_of(backbone_facts(inputs.backbone, inputs.blueprint)),
        as_size(sum(weight.numel() * weight.element_size() for weight in weights)),
        loaded.placed.device,
        start + 1,
        config.protocol.steps,
        data.batch_size,
    )


# -- training --------------------------------------------------------------------------------------


def train(
    config: FinetuneConfig,
    inputs: FinetuneInputs,
    loaded: LoadedModel,
    optimizer: Optimizer,
    *,
    start: int,
) -> None:
    """Train to the last step, logging and saving on the way."""
    protocol, run, folder = config.protocol, config.run, Path(config.run.folder)
    schedule = ScheduleConfig(
        steps=protocol.steps, warmup_fraction=protocol.warmup_fraction, decay=protocol.decay
    )
    curves = Curves(folder=folder, resume_step=start)
    tracked = Tracking(run.trackers).opened(curves)
    progress, recent = Progress(protocol.steps, start=start, what="finetune"), RecentSteps()
    loaded.placed.model.train()
    with Writer() as writer, tracked as track:
        metrics = Metrics(folder / "metrics.jsonl", resume_step=start, also=track)
        for number in range(start, protocol.steps):
            rate = config.optim.lr * optim.rate_factor(schedule, number)
            for group in optimizer.param_groups:
                group["lr"] = rate
            writer.check()
            values = train_step(config, loaded, optimizer, inputs.data.batch(number), number)
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
                writer.submit(partial(write, inputs.source))
            progress.advance(recent.add(values))
            if is_stopped:
                writer.wait()
                raise stopping.stop(f"step {step} is saved")
    progress.close()


def _write_step(
    metrics: Metrics, model: Any, copy: stock.StepCopy, folder: Path, step: int, source: Path
) -> None:
    """Write a saved step in the background, from copies that later steps do not change."""
    metrics.flush()
    stock.save_step(model, copy, folder, step, source)


def train_step(
    config: FinetuneConfig,
    loaded: LoadedModel,
    optimizer: Optimizer,
    rows: Sequence[EncodedRow],
    number: int,
) -> dict[str, float]:
    """One update; returns the losses and the norm of the gradient before clipping.

    Sums of the parts are divided by the counts of the whole batch, so the result does not depend on
    the size of micro batches.
    """
    counts, size = few_shot_loss.count(rows, config.protocol), config.micro_batch_size
    sums: dict[str, Tensor] = {}
    for start in range(0, len(rows), size):
        torch.manual_seed(seed_from("dropout", config.shots.seed, number, start))
        parts = few_shot_loss.forward(
            config.protocol,
            loaded.placed,
            loaded.placed.pack(rows[start : start + size]),
            lambda name, part: part.sum.sum() / counts[name],
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


def evaluate(
    config: FinetuneConfig, inputs: FinetuneInputs, loaded: LoadedModel, file: Path
) -> float:
    """Score the task's test rows, unless `file` has their scores already; returns the mean."""
    test = inputs.data.test
    if not file.exists():
        options, judged = config.scoring, {}
        with_texts = keeps_texts(options, len(test.rows))
        progress = Progress(len(test.rows), start=0, what="evaluate", unit="example")
        for way in answerers(test.rows, loaded.placed, None, loaded.tokenizer, options):
            for batch in way.batches:
                if stopping.is_asked():
                    raise stopping.stop("what was trained is saved, the scores begin again")
                for row, value in zip(batch, way.run(batch), strict=True):
                    question = test.questions[row.number]
                    judged[row.number] = judge(question, value, with_texts=with_texts)
                    progress.advance(config.task)
        progress.close()
        write_text(file, to_json_lines([judged[number] for number in range(len(test.rows))]))
    scores = summary.read_scores(file)
    if len(scores) != len(test.rows):
        raise RunError(f"{file}: not the scores of all its rows; delete it and run again")
    return metrics.score_of(scores)


def close(
    config: FinetuneConfig,
    inputs: FinetuneInputs,
    loaded: LoadedModel,
    *,
    before: float,
    after: float,
) -> None:
    """Write the result, the last file of a run, and print where everything is."""
    folder, questions = Path(config.run.folder), inputs.data.test.questions
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
    write_result(
        f"{config.task}: {questions[0].metric} {before:.2f} before, {after:.2f} after "
        f"{config.protocol.steps} steps\n"
        f"  adapter  {folder / 'adapter'}\n  numbers  {folder / 'metrics.jsonl'}\n"
    )
