"""Frozen linears in 8 and 4 bits: which they are, what they compute, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised_backbones
import torch
from quantised_backbones import (
    SIZES,
    TASK_IDS,
    batch,
    gradients,
    logits,
    make_adapter,
    quantised,
    relative,
    with_whole_weights,
)
from torch import Tensor, nn

from mhr_scale.adapters import find_sites
from mhr_scale.adapters.linear import Siblings
from mhr_scale.backbone import quantise
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.quantised_parts import keep_format
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError

DTYPES = ("float32", "bfloat16")
KINDS = ("int8", "nf4")
WO = "encoder.block.1.layer.1.DenseReluDense.wo"

Build = Callable[..., Any]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds a backbone as a verb does, on CPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return quantised_backbones.build


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    errors = {name: relative(found[name].float(), expected[name].float()) for name in expected}
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


# -- what is quantised -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_linears_of_the_blocks_but_wo_are_quantised_and_nothing_else(
    build: Build, kind: str
) -> None:
    model = build(kind)
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and not name.endswith(".wo")
    }
    assert quantised(model).keys() == expected
    assert len(expected) == 2 * 6 + 2 * 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_other_weights_have_the_recipes_type(build: Build, kind: str, dtype: str) -> None:
    model = build(kind, dtype=dtype)
    inside = {f"{name}.weight" for name in quantised(model)}
    others = {p.dtype for name, p in model.named_parameters() if name not in inside}
    assert others == {getattr(torch, dtype)}


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_are_frozen_and_the_model_is_in_evaluation_mode(
    build: Build, kind: str
) -> None:
    model = build(kind)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.0), ("nf4", 0.5)])
def test_a_quantised_weight_takes_so_many_bytes(build: Build, kind: str, most: float) -> None:
    for linear in quantised(build(kind)).values():
        weight = linear.weight
        held = weight.numel() * weight.element_size()
        assert held == most * linear.in_features * linear.out_features


@pytest.mark.parametrize("kind", KINDS)
def test_the_sites_of_a_layout_are_found_as_in_whole_weights(build: Build, kind: str) -> None:
    assert find_sites(build(kind), "full") == find_sites(build("none"), "full")


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_its_own_stays_one(build: Build, kind: str) -> None:
    model, bare = build(kind), build("none")
    assert torch.equal(model.lm_head.weight, bare.lm_head.weight)
    assert model.encoder.embed_tokens.weight is model.shared.weight


# -- what they compute -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_in_4_bits_computes_what_its_weights_stand_for(build: Build, dtype: str) -> None:
    model = build("nf4", dtype=dtype)
    expected = logits(with_whole_weights(model, build("none", dtype=dtype)))
    assert relative(logits(model), expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_in_8_bits_computes_nearly_what_its_weights_stand_for(
    build: Build, dtype: str
) -> None:
    model = build("int8", dtype=dtype)
    expected = logits(with_whole_weights(model, build("none", dtype=dtype)))
    assert relative(logits(model), expected) < 0.03  # activations are in 8 bits too


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_reach_wo_in_the_models_own_type(build: Build, kind: str, dtype: str) -> None:
    model, seen = build(kind, dtype=dtype), []
    model.get_submodule(WO).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    assert seen[0].dtype == getattr(torch, dtype)
    assert seen[0].frac().abs().max() > 0.0


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.04), ("nf4", 0.3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_near_those_of_whole_weights(
    build: Build, kind: str, most: float, dtype: str
) -> None:
    expected = logits(build("none"))
    assert relative(logits(build(kind, dtype=dtype)).float(), expected) < most


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("nf4", 0.06)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_a_real_backbone_are_near_those_of_whole_weights(
    build: Build, shared: Path, kind: str, most: float, dtype: str
) -> None:
    name = str(shared / "backbones" / "t5_mini_text")
    expected = logits(build("none", name=name))
    assert relative(logits(build(kind, name=name, dtype=dtype)).float(), expected) < most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_train_in_float32_with_the_gradients_of_what_the_weights_stand_for(
    build: Build, kind: str, dtype: str
) -> None:
    model = build(kind, dtype=dtype)
    bare = with_whole_weights(model, build("none", dtype=dtype))
    found = gradients(model, make_adapter(model))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert_close(found, gradients(bare, make_adapter(bare)), 1e-5 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_adapted_linear_keeps_the_type_of_the_frozen_product(
    build: Build, kind: str, dtype: str
) -> None:
    model = build(kind, dtype=dtype)
    adapter, seen = make_adapter(model), []
    for linear in adapter.linears:
        linear.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    with torch.no_grad(), adapter.slots(TASK_IDS):
        model(**batch(model))
    assert set(seen) == {getattr(torch, dtype)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_evaluated_trains_with_the_same_gradients(build: Build, kind: str) -> None:
    fresh, used = build(kind), build(kind)
    logits(used)
    expected = gradients(fresh, make_adapter(fresh))
    assert_close(gradients(used, make_adapter(used)), expected, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["reentrant", "non_reentrant"])
def test_recomputing_activations_leaves_gradients_as_they_are(
    build: Build, kind: str, recompute: str
) -> None:
    plain, sparing = build(kind), build(kind, recompute=recompute)
    expected = gradients(plain, make_adapter(plain))
    assert_close(gradients(sparing, make_adapter(sparing)), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_linears_that_run_together_give_what_they_give_one_by_one(build: Build, kind: str) -> None:
    models = [build(kind, fused_attention=is_fused) for is_fused in (True, False)]
    found = [gradients(model, make_adapter(model)) for model in models]
    counts = [sum(isinstance(m, Siblings) for m in model.modules()) for model in models]
    assert counts == [2 * 2 + 2 * 3, 2 + 2]  # feed-forwards run wi_0 and wi_1 together either way
    assert_close(*found, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_sit_in_a_model_that_transformers_quantised(kind: str, shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    options = {
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    }
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        shared / "backbones" / "t5_mini_text",
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(**options[kind]),
        device_map={"": "cpu"},
    )
    keep_format(model)
    adapter = make_adapter(model)
    found = gradients(model, adapter)
    assert adapter.compute_dtype() == torch.bfloat16
    assert all(tensor.isfinite().all() for tensor in found.values())


# -- at the door -----------------------------------------------------------------------------------


def test_widths_that_4_bits_cannot_hold_are_refused_with_the_way_out() -> None:
    config = BackboneConfig(config={**SIZES, "d_kv": 10}, quantise="nf4")
    with pytest.raises(BackboneError, match=r"those of o of 40 do not divide into them; use int8"):
        quantise.check(config, read_blueprint(config))


def test_8_bits_hold_any_width(build: Build) -> None:
    sizes = {**SIZES, "d_ff": 82, "d_kv": 5, "d_model": 20}
    expected = logits(build("none", config=sizes))
    assert relative(logits(build("int8", config=sizes)), expected) < 0.05
