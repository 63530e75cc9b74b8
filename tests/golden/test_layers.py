"""One adapted linear against the reference, output and every gradient.

float64 to 1e-10, float32 to 1e-5, relative to the largest entry.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mhr_scale.adapters import Adapter, routing
from mhr_scale.adapters.collapse import average
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.adapters.sites import Site
from mhr_scale.config import AdapterConfig

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def relative_error(value: Tensor, golden: Tensor) -> float:
    return float((value.double() - golden).abs().max() / golden.abs().max().clamp(min=1e-30))


@pytest.fixture(params=DTYPES, ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def make(layer: SimpleNamespace, dtype: torch.dtype) -> Adapter:
    meta, tensors = layer.meta, layer.tensors
    d_in, d_out = meta["d_in"], meta["d_out"]
    base = nn.Linear(d_in, d_out, bias=False)
    base.weight = nn.Parameter(tensors["weight"].to(dtype), requires_grad=False)
    site = Site(
        name="x", in_features=d_in, out_features=d_out, stack="encoder", block=0, sublayer=0
    )
    config = AdapterConfig(
        rank=meta["rank"], alpha=meta["alpha"], n_skills=meta["skills"], n_splits=meta["heads"]
    )
    names = [str(task) for task in range(meta["tasks"])]
    adapter = Adapter(config, (site,), task_names=names).to(dtype)
    adapter.linears.append(AdaptedLinear(base, "x"))
    stack = adapter.inventory.stacks[0]
    for side in "AB":
        adapter.inventory.stacked(stack, side).data[0] = tensors[side]
    if adapter.routing_logits is not None:
        adapter.routing_logits.data[:, 0] = tensors["Z"]
    return adapter


def run(adapter: Adapter, layer: SimpleNamespace, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = layer.tensors
    x = tensors["x"].to(dtype).requires_grad_()
    with adapter.slots(tensors["task_ids"]) as slots:
        y = adapter.linears[0](x)
        slots.backward((y * tensors["cotangent"].to(dtype)).sum())
    stack = adapter.inventory.stacks[0]
    found = {"y": y.detach(), "grad_x": x.grad}
    for side in "AB":
        found[f"grad_{side}"] = adapter.inventory.stacked(stack, side).grad[0]
    if adapter.routing_logits is not None:
        found["grad_Z"] = adapter.routing_logits.grad[:, 0]
    return found


def test_mixing_weights_equal_the_reference(layer: SimpleNamespace, dtype: torch.dtype) -> None:
    config = AdapterConfig(n_skills=layer.meta["skills"], n_splits=layer.meta["heads"])
    weights = routing.mixing_weights(layer.tensors["Z"].to(dtype)[:, None], config, seeds=None)
    assert relative_error(weights[:, 0], layer.tensors["mixing_weights"]) < DTYPES[dtype]


def test_output_and_gradients_equal_the_reference(
    layer: SimpleNamespace, dtype: torch.dtype
) -> None:
    found = run(make(layer, dtype), layer, dtype)
    errors = {name: relative_error(value, layer.tensors[name]) for name, value in found.items()}
    assert {name: error for name, error in errors.items() if error >= DTYPES[dtype]} == {}


def test_average_equals_the_reference(layer: SimpleNamespace, dtype: torch.dtype) -> None:
    adapter = make(layer, dtype)
    mean = average(adapter).to(dtype)
    mean.linears.append(adapter.linears[0])
    with torch.no_grad(), mean.slots([0] * len(layer.tensors["task_ids"])):
        y = mean.linears[0](layer.tensors["x"].to(dtype))
    assert relative_error(y, layer.tensors["y_average"]) < DTYPES[dtype]
