"""Short few-shot runs on rows of two toy tasks, and what they leave."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from processes import ROOT

from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    AdaptRunConfig,
    BackboneConfig,
    JsonlTasks,
    OptimConfig,
    PretrainConfig,
    ProtocolConfig,
    SelectionConfig,
    ShotsConfig,
    ToyTasks,
    VariantConfig,
)
from mhr_scale.recipe.reading import load
from mhr_scale.tasks import toy
from mhr_scale.tasks.task import Example
from mhr_scale.verbs.pretrain import pretrain

TOY = str(ROOT / "launch" / "recipes" / "toy.yaml")
SHORT = (
    "schedule.steps=4",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "tasks.n_tasks=4",
    "tasks.train_examples=10",
    "tasks.validation_examples=2",
    "run.validate_every=-1",
)
BARE = BackboneConfig(name="builtin:toy", dtype="float32")
LORA = VariantConfig(fresh=AdapterConfig(layout="attention", rank=2, n_skills=1))


def make_source(folder: Path, *overrides: str) -> Path:
    """The folder of a toy run of a few steps."""
    pretrain(load(PretrainConfig, TOY, [*SHORT, *overrides, f"run.folder={folder}"]))
    return folder


#: Held-out toy tasks whose batches have one shape: their jobs share waves.
TASKS = ("reverse.mirror.after", "rotate_right.plus4.before")


def write_rows(folder: Path, *, train: int = 10, validation: int = 5, test: int = 12) -> Path:
    """Rows of two held-out toy tasks as JSONL files."""
    made = toy.held_out_tasks(ToyTasks(suite="toy", fold="held_out", train_examples=40))
    for task in (task for task in made if task.name in TASKS):
        (folder / task.name).mkdir(parents=True)
        folds = {
            "train": task.train[:train],
            "validation": task.train[20 : 20 + validation],
            "test": task.test[:test],
        }
        for fold, examples in folds.items():
            if examples:
                write_fold(folder / task.name / f"{fold}.jsonl", examples)
    return folder


def write_fold(path: Path, examples: tuple[Example, ...], **changes: Any) -> None:
    rows = [
        {
            "id": example.id,
            "input": example.input,
            "target": example.targets[0],
            "choices": list(example.choices),
            "label": example.label,
            **changes,
        }
        for example in examples
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_config(
    folder: Path, rows: Path, variants: Mapping[str, VariantConfig], **changes: Any
) -> AdaptConfig:
    """Six steps of three epochs, evaluated at the start and after each epoch."""
    config = AdaptConfig(
        variants=dict(variants),
        tasks=JsonlTasks(suite="jsonl", folder=str(rows)),
        shots=ShotsConfig(seeds=(0,), count=8),
        protocol=ProtocolConfig(
            steps=6,
            batch_size=4,
            warmup_fraction=0.0,
            decay="constant",
            max_input_tokens=32,
            max_target_tokens=32,
        ),
        optim=OptimConfig(name="adamw", lr=2e-2, routing_lr=0.1),
        selection=SelectionConfig(on="test", every_epochs=1),
        run=AdaptRunConfig(folder=str(folder), log_every=1),
    )
    return replace(config, **changes)


def job_folders(run: Path) -> dict[tuple[str, str, str], Path]:
    """Folders of jobs by task, seed and variant."""
    return {path.parts[-3:]: path for path in sorted(run.glob("jobs/*/*/*"))}


def results(run: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Results of finished jobs by task, seed and variant."""
    return {
        key: json.loads((path / "result.json").read_text())
        for key, path in job_folders(run).items()
        if (path / "result.json").exists()
    }


def adapter_bytes(run: Path) -> dict[tuple[str, str, str], bytes]:
    """The adapters of finished jobs by task, seed and variant."""
    return {
        key: (run / "jobs" / "/".join(key) / "adapter" / "adapter.safetensors").read_bytes()
        for key in results(run)
    }


def contents(run: Path) -> dict[str, bytes]:
    """Every file below `jobs/` by its path."""
    files = (path for path in run.glob("jobs/**/*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def times(run: Path) -> dict[str, int]:
    """When each file below `jobs/` was written."""
    files = (path for path in run.glob("jobs/**/*") if path.is_file())
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in files}


def onto(config: AdaptConfig, folder: Path, **changes: Any) -> AdaptConfig:
    """The same settings in another run folder."""
    return replace(config, run=replace(config.run, folder=str(folder)), **changes)
