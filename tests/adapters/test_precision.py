"""Float32 adapters on a bfloat16 backbone, or on a float32 one under autocast."""

from contextlib import nullcontext

import pytest
import torch
from tiny import (
    TASKS,
    attach_copy,
    gradients,
    logits,
    make_adapted,
    make_batch,
    make_linear,
    make_t5,
)

from mhr_scale.adapters import AdapterConfig, attach
from mhr_scale.adapters.products import Cut, scale

TASK_IDS = (2, 0, 2, 1)
#: bfloat16 keeps 8 bits; a step of a tiny T5 rounds about a hundred times.
TOLERANCE = 0.05

CONFIGS = {
    "even": (AdapterConfig(n_skills=3, n_splits=4, rank=2), (0, 0, 1, 1)),
    "masked": (AdapterConfig(n_skills=3, n_splits=4, rank=2), TASK_IDS),
    "runs": (AdapterConfig(n_skills=3, n_splits=4, rank=11), TASK_IDS),
    "LoRA": (AdapterConfig(n_skills=1, rank=2), TASK_IDS),
    "ia3": (AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=4), TASK_IDS),
}


@pytest.fixture(params=CONFIGS)
def case(request):
    return CONFIGS[request.param]


@pytest.fixture(params=["bfloat16-backbone", "autocast"])
def low(request):
    """A function that makes the model in low precision, and the context to run it in."""
    if request.param == "autocast":
        return lambda: make_t5().train(), lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    return lambda: make_t5().to(torch.bfloat16).train(), nullcontext


def make_pair(config, low):
    make_low, context = low
    whole, adapter = make_adapted(config, dtype=torch.float32)
    for parameter in adapter.parameters():
        parameter.data.mul_(0.3 if parameter.dim() == 5 else 1.0)
    model = make_low()
    return (whole, adapter), (model, attach_copy(model, adapter)), context


def test_gradients_of_all_parameters_are_float32_and_agree_with_those_of_a_float32_backbone(
    case, low
):
    config, task_ids = case
    whole, (model, adapter), context = make_pair(config, low)
    expected = gradients(*whole, task_ids)
    with context():
        found = gradients(model, adapter, task_ids)
    assert found.keys() == dict(adapter.named_parameters()).keys()
    assert {tensor.dtype for tensor in (*found.values(), *adapter.parameters())} == {torch.float32}
    errors = {
        name: ((found[name] - tensor).norm() / tensor.norm()).item()
        for name, tensor in expected.items()
    }
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


def test_the_adapted_linear_keeps_the_dtype_of_the_frozen_product(case, low):
    config, task_ids = case
    _, (model, adapter), context = make_pair(config, low)
    found = []
    for linear in adapter.linears:
        linear.register_forward_hook(lambda module, args, y: found.append(y.dtype))
    with torch.no_grad(), context(), adapter.slots(task_ids):
        model(**make_batch(len(task_ids)))
    assert set(found) == {torch.bfloat16}


def test_slots_filled_outside_of_autocast_work_inside():
    model, adapter = make_adapted(CONFIGS["masked"][0], dtype=torch.float32)
    with adapter.slots(TASK_IDS) as slots, torch.autocast("cpu", dtype=torch.bfloat16):
        slots.backward(model(**make_batch(4)).loss)
    assert adapter.routing_logits.grad.isfinite().all()


# --- (IA)3


def scaled(y, l_UO, cotangent):
    """What `scale` gives, and its gradients."""
    y, l_UO = y.clone().requires_grad_(), l_UO.clone().requires_grad_()
    found = scale(y, l_UO, cut=Cut(is_open=True))
    found.backward(cotangent)
    return found.detach(), y.grad, l_UO.grad


@pytest.mark.parametrize("n_slots", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_output_is_the_exact_product_rounded_once(dtype, n_slots):
    generator = torch.Generator().manual_seed(0)
    lead = () if n_slots is None else (n_slots,)
    y = torch.randn(4, 3, 32, generator=generator).to(dtype)
    l_UO = 1 + 0.004 * torch.randn(*lead, 32, generator=generator)
    per_row = l_UO if n_slots is None else l_UO[:, None]
    cotangent = torch.randn(y.shape, generator=generator).to(dtype)
    found, dy, dl = scaled(y, l_UO, cotangent)
    assert torch.equal(found, (y.double() * per_row.double()).to(dtype))
    assert torch.equal(dy, (cotangent.double() * per_row.double()).to(dtype))
    exact = (y.double() * cotangent.double()).sum((0, 1) if n_slots is None else 1)
    torch.testing.assert_close(dl.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_rows", [1, 3, 8])
def test_rows_scaled_together_are_those_scaled_apart_bit_for_bit(n_rows):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4 * n_rows, 5, 33, generator=generator).to(torch.bfloat16)
    l_UO = 1 + 0.1 * torch.randn(4, 33, generator=generator)
    cotangent = torch.randn(y.shape, generator=generator).to(torch.bfloat16)
    together = scaled(y, l_UO, cotangent)
    parts = zip(y.split(n_rows), l_UO, cotangent.split(n_rows), strict=True)
    apart = zip(*(scaled(*part) for part in parts), strict=True)
    for whole, pieces in zip(together, apart, strict=True):
        assert torch.equal(whole, torch.stack(pieces).view_as(whole))


def test_small_steps_of_ia3_count_in_bfloat16(low):
    """1.0038 lies between two bfloat16 numbers and rounds to 1."""
    make_low, context = low
    model = make_low().eval()
    adapter = attach(model, AdapterConfig(kind="ia3", layout="light", n_skills=1), tasks=TASKS)
    with context():
        bare = logits(model, adapter, TASK_IDS)
        for vectors in adapter.parameters():
            vectors.data.fill_(1.0038)
        assert not torch.equal(logits(model, adapter, TASK_IDS), bare)


def test_tfews_layout_in_bfloat16_is_as_near_to_float32_as_the_bare_backbone():
    config = AdapterConfig(kind="ia3", layout="light", n_skills=1)
    whole, adapter = make_adapted(config, dtype=torch.float32)
    model = make_t5().to(torch.bfloat16)
    low = attach_copy(model, adapter)
    errors = []
    for off in (True, False):
        found = []
        for backbone, used in ((whole, adapter), (model, low)):
            with torch.no_grad(), used.slots(TASK_IDS), used.off() if off else nullcontext():
                found.append(backbone.eval()(**make_batch(4)).logits.float())
        errors.append(((found[1] - found[0]).norm() / found[0].norm()).item())
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("n_slots", [None, 2])
def test_modules_may_add_to_a_scaled_output_in_place(n_slots):
    y, lead = torch.ones(4, 3, 8, requires_grad=True), () if n_slots is None else (n_slots,)
    l_UO = torch.full((*lead, 8), 2.0, requires_grad=True)
    found = scale(y, l_UO, cut=Cut(is_open=True))
    found += y  # as a Falcon does
    found.sum().backward()
    assert torch.equal(y.grad, torch.full_like(y, 3.0))
    assert torch.equal(l_UO.grad, torch.full_like(l_UO, 12.0 if n_slots is None else 6.0))


def test_gradients_of_rows_that_share_a_slot_are_summed_in_float32():
    """300 rows of which each gives 1: in bfloat16 the sum would stay at 256."""
    config = AdapterConfig(private=True, n_skills=1)
    adapter = make_linear(config, n_in=4, n_out=3, dtype=torch.float32)
    linear = adapter.linears[0]
    linear.base.to(torch.bfloat16)
    for side in "AB":
        adapter.inventory.stacked(adapter.inventory.stacks[0], side).data.fill_(1.0)
    task_ids = [*(0,) * 150, 1, *(0,) * 150]
    x_BLI = torch.full((len(task_ids), 1, 4), 0.25, dtype=torch.bfloat16)
    with adapter.slots(task_ids) as slots:
        slots.backward(linear(x_BLI).sum())
    gradient = next(p for name, p in adapter.named_parameters() if name.startswith("inventory.B"))
    found = gradient.grad.select(1, 0).unique().tolist()
    assert found == [300.0 * config.scale]
