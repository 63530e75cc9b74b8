"""Fused parts of T5 against transformers' own: bit for bit, but for gelu's rounding."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from placed import place_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.activations import ACT2FN
from transformers.models.t5.modeling_t5 import T5LayerNorm

from mhr_scale.config import BackboneConfig
from mhr_scale.families import t5_fused
from mhr_scale.families.fused import gated
from mhr_scale.families.modes import set_recompute
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.table import find_family
from mhr_scale.passes import scoring

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")

SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "t5 v1.1": (T5, T5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5 v1.0": (T5, T5Config, {"feed_forward_proj": "relu"}),
    "gated silu": (T5, T5Config, {"feed_forward_proj": "gated-silu"}),
    "mt5": (MT5ForConditionalGeneration, MT5Config, {"feed_forward_proj": "gated-gelu"}),
}
#: Switches whose results are transformers' own, bit for bit, and the types in which they are.
EXACT = [("attention", "float32"), ("attention", "bfloat16"), ("norm", "float32")]
RECOMPUTE = ("none", "reentrant", "non_reentrant")


def switches(*names: str) -> BackboneConfig:
    """The settings of a backbone of which only these parts are fused."""
    parts = ("attention", "gate", "norm")
    return BackboneConfig(name="x", **{f"fused_{part}": part in names for part in parts})


def stock(family: str = "t5 v1.1", dtype: str = "float32", **changes: Any) -> Any:
    """A T5 of transformers, frozen, all of whose weights tell."""
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(3)
    model = model_class(config_class(**{**SIZES, **own, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(getattr(torch, dtype)).train().requires_grad_(False)


def fuse(model: Any, *names: str) -> Any:
    """A copy of the model with the named parts fused."""
    fused = copy.deepcopy(model)
    find_family(fused.config).fuse(fused, switches(*names))
    return fused


def batch(*, is_padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 96, (4, 17), generator=generator)
    inputs, labels = (part.contiguous() for part in ids.split([11, 6], dim=1))
    mask = torch.ones_like(inputs)
    if is_padded:
        mask[::2, -4:] = 0
        labels[1, -2:] = -100
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    found: Tensor = model(**batch(**options)).logits
    return found


def gradients(model: Any, **options: Any) -> dict[str, Tensor]:
    """Gradients of both stacks' embedded inputs, and of the weights that train."""
    given = batch(**options)
    embed = model.get_input_embeddings()
    inputs = embed(given["input_ids"]).detach().requires_grad_()
    targets = embed(model._shift_right(given["labels"])).detach().requires_grad_()
    loss = model(
        inputs_embeds=inputs,
        attention_mask=given["attention_mask"],
        decoder_inputs_embeds=targets,
        labels=given["labels"],
        use_cache=False,
    ).loss
    loss.backward()
    assert inputs.grad is not None
    assert targets.grad is not None
    weights = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"inputs": inputs.grad, "targets": targets.grad, **weights}


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    far = {name: error(found[name], expected[name]) for name in expected}
    assert {name: e for name, e in far.items() if not e <= tolerance} == {}


# -- what is exchanged -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_every_family_is_exchanged(family: str) -> None:
    model = fuse(stock(family), "attention", "gate", "norm")
    parts = (t5_fused.SelfAttention, t5_fused.CrossAttention, t5_fused.Norm)
    found = [sum(isinstance(m, part) for m in model.modules()) for part in parts]
    assert found == [4, 2, 2 * 2 + 2 * 3 + 2]
    gated = [m for m in model.modules() if isinstance(m, t5_fused.GatedFeedForward)]
    assert len(gated) == (0 if family == "t5 v1.0" else 4)
    assert {m.is_fused_gate for m in gated} <= {family in ("t5 v1.1", "mt5")}


def test_names_and_weights_stay() -> None:
    bare = stock()
    fused = fuse(bare, "attention", "gate", "norm")
    assert list(fused.state_dict()) == list(bare.state_dict())
    assert all(isinstance(m, type(o)) for m, o in zip(fused.modules(), bare.modules(), strict=True))


def test_switched_off_parts_stay_transformers_own() -> None:
    model = fuse(stock())
    fused = (t5_fused.Attention, t5_fused.Norm)
    assert not any(isinstance(module, fused) for module in model.modules())


# -- outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "dtype"), EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_own_bit_for_bit(family: str, part: str, dtype: str) -> None:
    bare = stock(family, dtype)
    fused = fuse(bare, part)
    for is_padded in (True, False):
        assert torch.equal(logits(fused, is_padded=is_padded), logits(bare, is_padded=is_padded))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parts_together_change_float32_logits_in_the_last_bits_at_most(family: str) -> None:
    bare = stock(family)
    assert error(logits(fuse(bare, "attention", "gate", "norm")), logits(bare)) < 2e-6


def test_dropout_draws_what_transformers_draws() -> None:
    bare = stock(dropout_rate=0.2)
    found = []
    for model in (bare, fuse(bare, "attention", "norm")):
        torch.manual_seed(5)
        found.append(logits(model))
    assert torch.equal(*found)
    assert not torch.equal(found[0], logits(bare))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_encoder_alone_gives_the_same(dtype: str) -> None:
    bare = stock(dtype=dtype)
    given = batch()
    del given["labels"]
    states = [model.encoder(**given).last_hidden_state for model in (bare, fuse(bare, "attention"))]
    assert torch.equal(*states)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_answers_and_their_scores_are_the_same(num_beams: int, use_cache: bool) -> None:
    bare = stock().eval()
    given = batch()
    options = {"num_beams": num_beams, "use_cache": use_cache, "max_new_tokens": 7}
    found = [
        model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        for model in (bare, fuse(bare, "attention", "norm"))
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert all(map(torch.equal, found[0].scores, found[1].scores))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_choices_under_their_own_mask_score_the_same(dtype: str) -> None:
    generator = torch.Generator().manual_seed(4)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 96, (length,), generator=generator).tolist())

    rows = [
        EncodedRow(ids(5 + number), tuple(ids(n) for n in (1, 3, 2 + number)), number=number)
        for number in range(3)
    ]
    bare = stock(dtype=dtype).eval()
    with torch.no_grad():
        expected, _ = scoring.choice_losses(place_model(bare), None, rows)
        found, _ = scoring.choice_losses(place_model(fuse(bare, "attention")), None, rows)
    assert torch.equal(found, expected)


# -- gelu and norm by themselves -------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gated_gelu(gate: Tensor, linear: Tensor) -> Tensor:
    return gated(gate, linear, "tanh_gelu")


def stock_gelu(gate: Tensor, linear: Tensor) -> Tensor:
    product: Tensor = ACT2FN["gelu_new"](gate) * linear
    return product


def with_gradients(gelu: Any, gate: Tensor, linear: Tensor) -> dict[str, Tensor]:
    gate, linear = (t.detach().clone().requires_grad_() for t in (gate, linear))
    y = gelu(gate, linear)
    y.backward(numbers(*y.shape, seed=2).to(y.dtype))
    assert gate.grad is not None
    assert linear.grad is not None
    return {"y": y.detach(), "gate": gate.grad, "linear": linear.grad}


def test_gelu_and_its_gradients_are_transformers_own_up_to_float32_rounding() -> None:
    given = numbers(64, 48), numbers(64, 48, seed=1)
    ours = with_gradients(gated_gelu, *given)
    assert_near(ours, with_gradients(stock_gelu, *given), 1e-6)


def test_in_bfloat16_gelu_is_nearer_to_the_truth_than_transformers_own() -> None:
    given = numbers(64, 48).bfloat16(), numbers(64, 48, seed=1).bfloat16()
    truth = with_gradients(stock_gelu, *(t.double() for t in given))
    ours, theirs = (with_gradients(gelu, *given) for gelu in (gated_gelu, stock_gelu))
    errors = {
        name: (error(ours[name], truth[name]), error(theirs[name], truth[name])) for name in truth
    }
    assert {name: pair for name, pair in errors.items() if not pair[0] < pair[1]} == {}


def test_gradients_of_gelu_are_those_of_finite_differences() -> None:
    given = [numbers(5, 4, seed=seed).double().requires_grad_() for seed in range(2)]
    assert torch.autograd.gradcheck(gated_gelu, given)


def test_gelu_keeps_its_two_inputs_and_nothing_else() -> None:
    kept: list[int] = []
    given = [numbers(64, 48, seed=seed).requires_grad_() for seed in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        gated_gelu(*given)
    assert kept == [64 * 48, 64 * 48]


def test_in_bfloat16_the_norm_is_no_further_from_the_truth_than_transformers_own() -> None:
    norm = T5LayerNorm(48)
    norm.weight.data = 1.0 + 0.3 * numbers(48)
    norm = norm.bfloat16()
    x = numbers(64, 48).bfloat16()
    with torch.no_grad():
        truth = copy.deepcopy(norm).double()(x.double())
        ours, theirs = t5_fused.Norm.forward(norm, x), norm(x)
    assert error(ours, truth) <= error(theirs, truth)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize(
    ("part", "dtype", "tolerance"),
    [
        ("attention", "float64", 1e-12),
        ("attention", "float32", 1e-5),
        ("gate", "float64", 1e-12),
        ("gate", "float32", 1e-5),
        ("norm", "float32", 1e-5),
    ],
)
def test_gradients_of_the_inputs_are_transformers_own(
    part: str, dtype: str, tolerance: float, is_padded: bool
) -> None:
    bare = stock(dtype=dtype)
    found = gradients(fuse(bare, part), is_padded=is_padded)
    assert_near(found, gradients(bare, is_padded=is_padded), tolerance)


@dataclass(frozen=True)
class Mask:
    """An additive mask as attention got it: where it lies, and whether it wanted a gradient."""

    address: int
    requires_grad: bool


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Mask]:
    """The masks that attention gets, in order."""
    seen: list[Mask] = []
    attend = F.scaled_dot_product_attention

    def watch(*args: Any, attn_mask: Tensor, **options: Any) -> Tensor:
        seen.append(Mask(attn_mask.data_ptr(), attn_mask.requires_grad))
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    return seen


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_recomputation_changes_no_gradient_and_wants_none_of_the_position_bias(
    mode: str, masks: list[Mask]
) -> None:
    bare = stock()
    expected = gradients(fuse(bare, "attention", "gate", "norm"))
    model = fuse(bare, "attention", "gate", "norm")
    set_recompute(model, mode)
    masks.clear()
    # the reentrant kind adds up the residual stream in another order
    assert_near(gradients(model), expected, 1e-6 if mode == "reentrant" else 0.0)
    assert len(masks) == (6 if mode == "none" else 12)
    assert not any(mask.requires_grad for mask in masks)


def test_bias_and_mask_are_merged_once_per_stack(masks: list[Mask]) -> None:
    logits(fuse(stock(num_layers=3), "attention"))
    # 3 in the encoder; then self- and cross-attention of the decoder by turns
    encoder, own, cross = masks[:3], masks[3::2], masks[4::2]
    for stack in (encoder, own, cross):
        assert len(stack) == 3
        assert len({mask.address for mask in stack}) == 1


@pytest.mark.parametrize("mode", RECOMPUTE)
@pytest.mark.parametrize("family", ["t5 v1.1", "mt5"])
def test_a_backbone_that_trains_gets_all_its_gradients(family: str, mode: str) -> None:
    bare = stock(family)
    model = fuse(bare, "attention", "gate", "norm")
    set_recompute(model, mode)
    for one in (bare, model):
        one.requires_grad_(True)
    found, expected = gradients(model), gradients(bare)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert bool(expected[bias].any())
    assert_near(found, expected, 1e-4)


def test_parts_are_classes_made_once() -> None:
    first, second = fuse(stock(), "attention", "norm"), fuse(stock(), "attention", "norm")
    modules: Iterator[tuple[nn.Module, nn.Module]] = zip(
        first.modules(), second.modules(), strict=True
    )
    assert all(type(one) is type(other) for one, other in modules)
