"""What `plan` predicts against what real steps on the CPU take, by the profiler's account.

The predictions are made from models of 3 and 4 blocks a stack, the real ones have more; nothing is
fitted. Peaks are those above the frozen weights, which are counted exactly.
"""

from typing import Any

import pytest
from measured_steps import pretraining_peak, scoring_peak, wave_peak

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    AdaptRunConfig,
    BackboneConfig,
    BatchConfig,
    OptimConfig,
    PretrainConfig,
    ProtocolConfig,
    RunConfig,
    ScheduleConfig,
    ScoringConfig,
    ToyTasks,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.planning.cost import Passes
from mhr_scale.planning.steps import Shape, at_depth, trace_pretraining, trace_scoring, trace_wave

pytestmark = pytest.mark.slow

SMALL = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_heads": 4,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "vocab_size": 1000,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
ADAPTERS = {
    "lora": AdapterConfig(n_skills=1, rank=4),
    "mhr": AdapterConfig(n_skills=4, n_splits=8),
    "attention": AdapterConfig(layout="attention", n_skills=4),
}
SHAPE = Shape(rows=4, width=64, depth=16, n_tasks=3)


def small(recompute: Any = "none", dtype: Any = "float32", **sizes: int) -> BackboneConfig:
    return BackboneConfig(config={**SMALL, **sizes}, recompute=recompute, dtype=dtype)


def llama(recompute: Any = "none", dtype: Any = "float32") -> BackboneConfig:
    return BackboneConfig(config=LLAMA, recompute=recompute, dtype=dtype)


def pretraining(
    backbone: BackboneConfig,
    adapter: str,
    optim: Any = "adafactor",
    *,
    packing: bool = True,
) -> PretrainConfig:
    return PretrainConfig(
        batch=BatchConfig(packing=packing),
        backbone=backbone,
        adapter=ADAPTERS[adapter],
        tasks=ToyTasks(suite="toy"),
        optim=OptimConfig(name=optim),
        schedule=ScheduleConfig(steps=10),
        run=RunConfig(folder="planned"),
    )


def predict(config: PretrainConfig, shape: Shape) -> Any:
    return at_depth(
        read_blueprint(config.backbone),
        lambda blueprint: trace_pretraining(
            config, blueprint, shape, n_tasks=5, accumulates=True, on_gpu=False
        ),
    )


@pytest.mark.parametrize(
    ("adapter", "recompute", "dtype", "optim", "packing"),
    [
        ("lora", "none", "float32", "adamw", False),
        ("lora", "none", "float32", "adamw", True),
        ("mhr", "none", "bfloat16", "adafactor", True),
        ("mhr", "reentrant", "bfloat16", "adamw", False),
        ("mhr", "non_reentrant", "float32", "adafactor", True),
        ("attention", "reentrant", "float32", "adafactor", True),
    ],
)
def test_the_peak_of_a_training_step_is_predicted_within_five_percent(
    adapter: str, recompute: str, dtype: str, optim: str, packing: bool
) -> None:
    config = pretraining(small(recompute, dtype), adapter, optim, packing=packing)
    real = pretraining_peak(config, SHAPE, n_tasks=5)
    assert predict(config, SHAPE).peak == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(
    ("recompute", "dtype", "packing"),
    [("none", "bfloat16", True), ("reentrant", "float32", True), ("none", "bfloat16", False)],
)
def test_decoder_only_backbones_are_predicted_too(
    recompute: str, dtype: str, packing: bool
) -> None:
    config = pretraining(llama(recompute, dtype), "mhr", packing=packing)
    real = pretraining_peak(config, SHAPE, n_tasks=5)
    assert predict(config, SHAPE).peak == pytest.approx(real, rel=0.05)


def test_stacks_of_unequal_depth_are_predicted_too() -> None:
    config = pretraining(small("reentrant", num_layers=7, num_decoder_layers=5), "lora")
    real = pretraining_peak(config, SHAPE, n_tasks=5)
    assert predict(config, SHAPE).peak == pytest.approx(real, rel=0.05)


def test_more_rows_are_predicted_from_fewer() -> None:
    config = pretraining(small(), "mhr")
    few, many = (Shape(rows=n, width=64, depth=16, n_tasks=n) for n in (2, 4))
    counts = Passes(few=2, many=4, of_few=predict(config, few), of_many=predict(config, many))
    wanted = Shape(rows=12, width=64, depth=16, n_tasks=5)
    real = pretraining_peak(config, wanted, n_tasks=5)
    assert counts.at(12).peak == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(
    ("loss", "n_choices", "backbone", "packing"),
    [
        ("t_few", 3, small(), True),
        ("language_model", 1, small(), False),
        ("t_few", 3, llama(), True),
    ],
    ids=["t_few", "language_model, padded", "t_few, llama"],
)
def test_the_peak_of_a_wave_is_predicted_within_five_percent(
    loss: Any, n_choices: int, backbone: BackboneConfig, packing: bool
) -> None:
    variant = VariantConfig(fresh=ADAPTERS["mhr"])
    config = AdaptConfig(
        variants={"MHR": variant},
        tasks=ToyTasks(suite="toy"),
        backbone=backbone,
        protocol=ProtocolConfig(loss=loss),
        waves=WavesConfig(packing=packing),
        run=AdaptRunConfig(folder="planned"),
    )
    assert config.backbone is not None
    frozen, shape = config.backbone, Shape(rows=2, width=48, depth=8, n_choices=n_choices)

    def count(blueprint: Any) -> Any:
        return trace_wave(
            config, variant, ADAPTERS["mhr"], blueprint, frozen, shape, n_jobs=3, on_gpu=False
        )

    predicted = at_depth(read_blueprint(frozen), count).peak
    real = wave_peak(config, "MHR", shape, n_jobs=3)
    assert predicted == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("frozen", [small(), llama()], ids=["t5", "llama"])
def test_the_peak_of_ranking_choices_is_predicted_within_five_percent(
    frozen: BackboneConfig, packing: bool
) -> None:
    shape = Shape(rows=6, width=64, depth=4, n_choices=4, n_tasks=3)
    options = ScoringConfig(packing=packing)

    def count(blueprint: Any) -> Any:
        return trace_scoring(options, ADAPTERS["mhr"], blueprint, frozen, shape, on_gpu=False)

    predicted = at_depth(read_blueprint(frozen), count).peak
    real = scoring_peak(frozen, ADAPTERS["mhr"], shape, packing=packing)
    assert predicted == pytest.approx(real, rel=0.05)
