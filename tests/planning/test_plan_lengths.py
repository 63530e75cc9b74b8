"""How long rows are taken to be: by the plan's settings, or by the tokens that a run would read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import (
    AdapterConfig,
    BackboneConfig,
    BatchConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    ToyTasks,
    WorkloadConfig,
)
from mhr_scale.errors import ConfigError
from mhr_scale.planning.lengths import Lengths, lengths_of, lengths_of_run
from mhr_scale.planning.steps import Shape
from mhr_scale.rows.tokens import open_tokens
from mhr_scale.training.opening import make_plan

SHAPE = Shape(rows=4, width=32, depth=24, n_tasks=3)
MOST = (32, 24)


def toy(cache: Path) -> PretrainConfig:
    return PretrainConfig(
        backbone=BackboneConfig(name="builtin:toy"),
        adapter=AdapterConfig(),
        tasks=ToyTasks(suite="toy", n_tasks=4, train_examples=40, validation_examples=2),
        batch=BatchConfig(
            batch_size=16, micro_batch_size=4, max_input_tokens=32, max_target_tokens=24
        ),
        schedule=ScheduleConfig(steps=10),
        run=RunConfig(folder="planned", token_cache=str(cache)),
    )


def of_run(config: PretrainConfig, *, is_flat: bool, **given: Any) -> Lengths:
    return lengths_of_run(config, WorkloadConfig(**given), is_flat=is_flat)


def test_tokens_that_a_run_would_read_say_how_long_its_rows_are(tmp_path: Path) -> None:
    config = toy(tmp_path)
    assert of_run(config, is_flat=True).usual(SHAPE) == SHAPE  # nothing is there yet
    blueprint = read_blueprint(config.backbone)
    tokenizer = load_tokenizer(config.backbone, blueprint)
    cache = config.run.token_cache
    tokens = open_tokens(config.tasks, tokenizer, config.batch, blueprint.family, cache=cache)
    found = of_run(config, is_flat=True)
    samples = make_plan(config, tokens).samples(0, 160)
    rows = [tokens.train[sample.task][sample.row] for sample in samples]
    assert found.mean == (
        pytest.approx(sum(len(row.input_ids) for row in rows) / 160),
        pytest.approx(sum(len(row.answers[0]) for row in rows) / 160),
    )
    assert found.padding is not None
    assert found.padded is not None
    assert sum(found.padded) * (1.0 - found.padding) == pytest.approx(found.tokens)
    width, depth = map(round, found.mean)
    assert found.usual(SHAPE) == replace(SHAPE, width=width, depth=depth, room=MOST)
    padded = of_run(config, is_flat=False)
    assert sum(padded.in_pass) == pytest.approx(found.tokens / (1.0 - found.padding))
    assert "run.token_cache" in padded.notes("batch.packing")[0]
    assert f"{found.padding:.0%} of their tokens" in found.notes("batch.packing")[1]
    # what is said wins over what is there
    assert of_run(config, is_flat=True, input_tokens=40).in_pass == (40, 24)
    assert of_run(config, is_flat=True, mean_input_tokens=9.0).in_pass == (9.0, 24)


def test_padded_rows_of_a_known_mean_are_counted_as_long_as_they_may_be() -> None:
    workload = WorkloadConfig(mean_input_tokens=9.0, mean_target_tokens=3.2)
    flat, padded = (lengths_of(workload, MOST, is_flat=is_flat) for is_flat in (True, False))
    assert flat.usual(SHAPE) == replace(SHAPE, width=9, depth=3, room=MOST)
    assert padded.usual(SHAPE) == SHAPE
    assert flat.tokens == padded.tokens == pytest.approx(12.2)


def test_a_mean_above_the_longest_is_refused() -> None:
    workload = WorkloadConfig(mean_target_tokens=25.0)
    with pytest.raises(ConfigError, match=r"workload.mean_target_tokens: 25 is above the 24 tok"):
        lengths_of(workload, MOST, is_flat=True)
