"""Short runs of pre-training on the toy suite."""

from pathlib import Path

from processes import ROOT

from mhr_scale.config import PretrainConfig
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.pretrain import pretrain

TOY = str(ROOT / "launch" / "recipes" / "toy.yaml")
SHORT = (
    "schedule.steps=4",
    "run.log_every=1",
    "run.save_every=2",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "tasks.n_tasks=6",
    "tasks.train_examples=10",
    "tasks.validation_examples=2",
)


def train(folder: Path, *overrides: str) -> Path:
    return pretrain(load(PretrainConfig, TOY, [*SHORT, f"run.folder={folder}", *overrides]))
