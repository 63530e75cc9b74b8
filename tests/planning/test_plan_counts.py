"""Counts made with less work, against those of the whole way: equal to the last number."""

from dataclasses import replace
from typing import Any

import pytest

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import (
    AdapterConfig,
    BackboneConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    ToyTasks,
)
from mhr_scale.families.packed import Packed
from mhr_scale.planning import steps
from mhr_scale.planning.steps import Shape, trace_pretraining
from mhr_scale.planning.tracing import Trace
from mhr_scale.training.trainer import Trainer

TINY = {
    "vocab_size": 384,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
SHAPE = Shape(rows=4, width=16, depth=8, n_tasks=3)


def pretraining(recompute: Any, dtype: Any, optim: Any, **adapter: Any) -> PretrainConfig:
    return PretrainConfig(
        backbone=BackboneConfig(config=TINY, recompute=recompute, dtype=dtype),
        adapter=AdapterConfig(**adapter),
        tasks=ToyTasks(suite="toy"),
        optim=OptimConfig(name=optim),
        schedule=ScheduleConfig(steps=10),
        run=RunConfig(folder="planned"),
    )


def trace(config: PretrainConfig, *, on_gpu: bool) -> Trace:
    blueprint = read_blueprint(config.backbone)
    return trace_pretraining(config, blueprint, SHAPE, n_tasks=5, accumulates=True, on_gpu=on_gpu)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("recompute", ["none", "reentrant"])
@pytest.mark.parametrize(
    ("dtype", "optim", "adapter"),
    [
        ("bfloat16", "adafactor", {"n_skills": 4, "n_splits": 4}),
        ("float32", "adamw", {"n_skills": 4, "policy": "noisy", "rank": 4}),
        ("float32", "adafactor", {"kind": "ia3", "n_skills": 1}),
        ("bfloat16", "adafactor", {"n_skills": 1, "private": True}),
    ],
)
def test_a_step_after_gradients_of_zeros_counts_as_one_after_a_real_step(
    on_gpu: bool,
    recompute: str,
    dtype: str,
    optim: str,
    adapter: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = pretraining(recompute, dtype, optim, **adapter)
    quick = trace(config, on_gpu=on_gpu)

    def accumulate(trainer: Trainer, packed: Packed) -> None:
        trainer.accumulate([packed])

    monkeypatch.setattr(steps, "leave_gradients", accumulate)
    whole = trace(config, on_gpu=on_gpu)
    before_blocks = {"start"}  # what the whole way counts to the end of the step before
    assert quick.peaks.keys() - whole.peaks.keys() == before_blocks
    for name in ("peaks", "logits"):
        counts = getattr(quick, name)
        assert {segment: counts[segment] for segment in whole.peaks} == getattr(whole, name)
    assert quick.peak == whole.peak
    for name in ("held", "passes", "update"):
        assert getattr(quick, name) == getattr(whole, name)


DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"model_type": "llama"}, 2 * 3 * 48 * 32),
        # two experts for every token
        ({"model_type": "mixtral", "num_local_experts": 4}, 2 * 2 * 3 * 48 * 32),
    ],
)
def test_shared_heads_and_experts_are_counted(
    on_gpu: bool, fields: dict[str, Any], weights: int
) -> None:
    config = replace(
        pretraining("none", "float32", "adamw", n_skills=2, layout="attention"),
        backbone=BackboneConfig(config={**DECODER, **fields}, dtype="float32"),
    )
    traced = trace(config, on_gpu=on_gpu)
    flop = sum(flop * n for (flop, _), n in traced.passes.items())
    assert flop > 2 * weights * SHAPE.rows * SHAPE.width


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_a_gpu_s_step_over_a_decoder_only_backbone_has_a_cpu_s_products(model_type: str) -> None:
    """Attention apart: GPUs copy the keys and values of shared heads, and run it as one kernel."""
    config = replace(
        pretraining("none", "bfloat16", "adamw", n_skills=4, n_splits=4),
        backbone=BackboneConfig(config={**DECODER, "model_type": model_type, "head_dim": 8}),
    )
    on_cpu, on_gpu = (trace(config, on_gpu=on_gpu) for on_gpu in (False, True))
    products = [sum(flop * n for (flop, _), n in one.passes.items()) for one in (on_cpu, on_gpu)]
    assert products[1] == pytest.approx(products[0], rel=0.1)
    assert on_gpu.peak > 0
