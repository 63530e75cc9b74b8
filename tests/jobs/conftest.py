"""Recipes of jobs that train the backbone too."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from full_jobs import ADAMW, FULL, RANKED, TOY, write_task

from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    JsonlTasks,
    ScoringConfig,
    SelectionConfig,
    ShotsConfig,
)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., AdaptConfig]:
    """Makes a recipe: the tasks and the name of the run folder, and what is not as usual."""

    def recipe(tasks: tuple[str, ...] = ("one",), run: str = "run", **changes: Any) -> AdaptConfig:
        folder = tmp_path / "-".join(tasks)
        for task in tasks:
            if not (folder / task).exists():
                write_task(folder, task)
        config = AdaptConfig(
            variants={"f": FULL},
            tasks=JsonlTasks(suite="jsonl", folder=str(folder), validation_examples=0),
            shots=ShotsConfig(seeds=(0,)),
            backbone=TOY,
            protocol=RANKED,
            optim=ADAMW,
            selection=SelectionConfig(on="last"),
            scoring=ScoringConfig(metric="accuracy"),
            run=AdaptRunConfig(folder=str(tmp_path / run), log_every=1),
        )
        return replace(config, **changes)

    return recipe
