"""Runs that are asked to stop, in which call of which function a test likes."""

from pathlib import Path
from typing import Any

import pytest
from processes import timeless
from small_runs import TOY
from toy_finetunes import toy

from mhr_scale.config import FinetuneConfig, PretrainConfig, ProtocolConfig
from mhr_scale.recipe.reading import load
from mhr_scale.run import stopping

SETTINGS = (
    "adapter={n_skills: 3, rank: 2, policy: noisy}",
    "schedule.steps=5",
    "schedule.warmup_fraction=0.2",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "tasks.n_tasks=4",
    "tasks.train_examples=10",
    "tasks.validation_examples=2",
    "run.log_every=1",
    "run.save_every=4",
    "run.validate_every=2",
)


def stopped(verb: Any, config: Any, owner: object, name: str, call: int) -> str:
    """Run a verb that is asked to stop in the so-many-th call of a function; what it says."""
    function, calls = getattr(owner, name), [0]

    def asked(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            stopping.ask("SIGTERM")
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, asked)
        with pytest.raises(stopping.Stopped) as caught:
            verb(config)
    stopping.forget()
    return str(caught.value)


def recipe(folder: Path, *overrides: str) -> PretrainConfig:
    return load(PretrainConfig, TOY, [*SETTINGS, f"run.folder={folder}", *overrides])


def check_same(folder: Path, whole: Path) -> None:
    for name in ("adapter/adapter.safetensors", "steps/000005/resume/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert timeless(folder) == timeless(whole)


def lora(exported: Path, folder: Path) -> FinetuneConfig:
    """Six steps of fine-tuning, saved after the fourth."""
    protocol = ProtocolConfig(
        steps=6, loss="language_model", max_input_tokens=32, max_target_tokens=32
    )
    return toy(exported, folder, protocol=protocol)
