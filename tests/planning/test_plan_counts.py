"""Counts made with less work, against those of the whole way: equal to the last number."""

from dataclasses import replace
from typing import Any

import pytest
from measured_steps import NOTHING, open_model

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import (
    AdapterConfig,
    BackboneConfig,
    BatchConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    ToyTasks,
)
from mhr_scale.families.packed import Packed
from mhr_scale.planning import steps
from mhr_scale.planning.steps import Shape, trace_pretraining
from mhr_scale.planning.tracing import StepCounter, Trace
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


def trace(config: PretrainConfig, *, on_gpu: bool, shape: Shape = SHAPE) -> Trace:
    blueprint = read_blueprint(config.backbone)
    return trace_pretraining(config, blueprint, shape, n_tasks=5, accumulates=True, on_gpu=on_gpu)


def products_of(traced: Trace) -> dict[tuple[float, float], float]:
    return {(flop, moved): n for (flop, moved), n in traced.passes.items() if flop}


def flop_of(traced: Trace) -> float:
    return sum(flop * n for (flop, _), n in traced.passes.items())


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
    assert flop_of(traced) > 2 * weights * SHAPE.rows * SHAPE.width


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_a_gpu_s_step_over_a_decoder_only_backbone_has_a_cpu_s_products(model_type: str) -> None:
    """Attention apart: GPUs copy the keys and values of shared heads, and run it as one kernel."""
    config = replace(
        pretraining("none", "bfloat16", "adamw", n_skills=4, n_splits=4),
        backbone=BackboneConfig(config={**DECODER, "model_type": model_type, "head_dim": 8}),
    )
    on_cpu, on_gpu = (trace(config, on_gpu=on_gpu) for on_gpu in (False, True))
    assert flop_of(on_gpu) == pytest.approx(flop_of(on_cpu), rel=0.1)
    assert on_gpu.peak > 0


BACKBONES: dict[str, dict[str, Any]] = {"t5": TINY, "llama": {**DECODER, "model_type": "llama"}}
#: Rows of 12 + 4 tokens where the longest has 32 + 8.
SHORT = Shape(rows=4, width=12, depth=4, n_tasks=3, room=(32, 8))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_what_is_planned_is_what_a_step_over_real_tensors_does(
    backbone: str, packing: bool
) -> None:
    config = replace(
        pretraining("none", "float32", "adamw", n_skills=4, n_splits=4),
        backbone=BackboneConfig(config=BACKBONES[backbone], dtype="float32"),
        batch=BatchConfig(packing=packing),
    )
    planned = trace(config, on_gpu=False, shape=SHORT)
    placed, adapter = open_model(config.backbone, steps.fresh(config.adapter, 5))
    parts: dict[str, Any] = {"tokens": NOTHING, "batches": NOTHING, "backbone_facts": {}}
    trainer = Trainer(config, placed=placed, adapter=adapter, **parts)
    packed = steps.pack_step(config, placed, SHORT)
    trainer.accumulate([packed])
    counter = StepCounter(n_words=placed.model.config.vocab_size)
    with counter.watch(placed.model, {}):
        trainer.accumulate([packed])
    assert products_of(counter.trace()) == products_of(planned)
    moved = [sum(size * n for (_, size), n in one.passes.items()) for one in (counter, planned)]
    assert moved[0] == pytest.approx(moved[1], rel=1e-3)  # small tensors are made otherwise
    assert (packed.n_padding == 0) == packing


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_packed_rows_have_room_in_attention_alone(backbone: str, on_gpu: bool) -> None:
    """And on GPUs, where a kernel takes rows apart, not even there."""

    def flop(shape: Shape, *, packing: bool) -> float:
        config = replace(
            pretraining("none", "bfloat16", "adamw", n_skills=1),
            backbone=BackboneConfig(config=BACKBONES[backbone], dtype="bfloat16"),
            batch=BatchConfig(packing=packing),
        )
        return flop_of(trace(config, on_gpu=on_gpu, shape=shape))

    tight = replace(SHORT, room=(0, 0))
    packed, roomy = (flop(shape, packing=True) for shape in (tight, SHORT))
    padded = flop(SHORT, packing=False)
    if backbone == "llama" and on_gpu:
        assert roomy == packed
    assert packed <= roomy < 0.75 * padded
