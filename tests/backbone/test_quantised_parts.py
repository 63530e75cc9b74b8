"""Quantised linears as tensors of a file: the bits are bitsandbytes', and nothing is copied."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhr_scale.backbone.quantised_parts import (
    CHUNK,
    TEXT,
    TEXT_BYTES,
    import_bitsandbytes,
    make_linear,
    pack,
    plan_parts,
    stored_kind,
    unpack,
)

KINDS = ("int8", "nf4")
DTYPES = (torch.float32, torch.bfloat16)
FUNCTIONAL = import_bitsandbytes().functional


def weight_of(width_O: int = 24, width_I: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    weight_OI = torch.randn(width_O, width_I, generator=torch.Generator().manual_seed(3))
    weight_OI[1, :64] = 0.0  # a block, and for nf4 a scale, of zero
    weight_OI[2, 5] = 40.0
    return weight_OI.to(dtype)


def their_state(weight_OI: Tensor, kind: str) -> dict[str, Tensor]:
    """The state dict of a linear that bitsandbytes has quantised itself."""
    nn = import_bitsandbytes().nn
    width_O, width_I = weight_OI.shape
    if kind == "int8":
        linear = nn.Linear8bitLt(width_I, width_O, bias=False, has_fp16_weights=False)
        linear.weight = nn.Int8Params(weight_OI, requires_grad=False).to("cpu")
    else:
        linear = nn.Linear4bit(width_I, width_O, bias=False)
        linear.weight = nn.Params4bit(weight_OI, quant_type="nf4", module=linear).to("cpu")
    found: dict[str, Tensor] = linear.state_dict()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_bit_for_bit_what_bitsandbytes_stores(kind: str, dtype: torch.dtype) -> None:
    weight_OI = weight_of(dtype=dtype)
    found, expected = pack(weight_OI, kind), their_state(weight_OI, kind)
    assert found.keys() == expected.keys()
    if kind == "nf4":
        text = bytes(found.pop(TEXT).tolist())
        assert len(text) == TEXT_BYTES
        assert text.rstrip() == bytes(expected.pop(TEXT).tolist())
    for name, part in expected.items():
        assert found[name].dtype == part.dtype
        assert torch.equal(found[name], part)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_the_same_over_the_edges_of_chunks(kind: str) -> None:
    weight_OI = torch.randn(3 * CHUNK // 2 // 64, 64, generator=torch.Generator().manual_seed(4))
    found, expected = pack(weight_OI, kind), their_state(weight_OI, kind)
    for name in ("weight", "weight.absmax" if kind == "nf4" else "SCB"):
        assert torch.equal(found[name], expected[name])


def test_numbers_on_a_bound_between_two_codes_are_rounded_as_bitsandbytes_does() -> None:
    values = FUNCTIONAL.get_4bit_type("nf4", device="cpu")
    bounds = (values[:-1] + values[1:]) / 2
    weight_OI = torch.cat([bounds, values, torch.zeros(33)])[None].contiguous()
    assert weight_OI.abs().max() == 1.0  # the scale: numbers stay as they are
    assert torch.equal(pack(weight_OI, "nf4")["weight"], their_state(weight_OI, "nf4")["weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 128), (3, 64)])
def test_parts_are_as_planned(kind: str, shape: tuple[int, int]) -> None:
    parts = pack(weight_of()[: shape[0], : shape[1]], kind)
    planned = plan_parts("a.q", shape, kind)
    assert {p.name for p in planned} == {f"a.q.{name}" for name in parts}
    for one in planned:
        part = parts[one.name.removeprefix("a.q.")]
        assert (tuple(part.shape), part.dtype) == (one.shape, one.dtype)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_uses_the_tensors_it_is_made_of(kind: str, is_training: bool) -> None:
    parts = pack(weight_of(), kind)
    linear: Any = make_linear(parts, kind=kind, shape=(24, 128), dtype=torch.float32)
    place = parts["weight"].data_ptr()
    for _ in range(2):
        assert linear.weight.data_ptr() == place
        x_BI = torch.randn(5, 128, requires_grad=is_training)
        y_BO = linear.train(is_training)(x_BI)
        if is_training:
            y_BO.sum().backward()
            assert x_BI.grad is not None
    assert linear.weight.data_ptr() == place
    if kind == "nf4":
        assert linear.weight.quant_state.absmax.data_ptr() == parts["weight.absmax"].data_ptr()
    else:
        assert linear.state.CB.data_ptr() == place
        assert linear.state.SCB.data_ptr() == parts["SCB"].data_ptr()


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("nf4", 0.25)])
def test_parts_stand_for_nearly_the_weight(kind: str, most: float) -> None:
    weight_OI = weight_of()
    whole = unpack(pack(weight_OI, kind), kind)
    assert whole.dtype == torch.float32
    assert whole.shape == weight_OI.shape
    assert 1e-3 < (whole - weight_OI).norm() / weight_OI.norm() < most


def test_four_bits_stand_for_what_the_product_takes() -> None:
    parts = pack(weight_of(), "nf4")
    linear = make_linear(parts, kind="nf4", shape=(24, 128), dtype=torch.float32)
    assert torch.equal(linear(torch.eye(128)).T, unpack(parts, "nf4"))


def test_a_note_alone_or_of_another_kind_says_nothing(tmp_path: Path) -> None:
    note = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    assert stored_kind(note, {"a.q.weight", "a.q.SCB"}) == "int8"
    assert stored_kind(note, {"a.q.weight"}) == "none"
    assert stored_kind({**note, "llm_int8_threshold": 5.0}, {"a.q.SCB"}) == "none"
    assert stored_kind({**note, "quant_method": "gptq"}, {"a.q.SCB"}) == "none"
    assert stored_kind(None, {"a.q.SCB"}) == "none"
