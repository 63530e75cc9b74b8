"""Float32 adapters on a bfloat16 backbone, or on a float32 one under autocast."""

from contextlib import nullcontext

import pytest
import torch
from tiny import attach_copy, gradients, make_adapted, make_batch, make_t5

from mhr_scale.adapters import AdapterConfig

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
