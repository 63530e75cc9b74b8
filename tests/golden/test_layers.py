"""One adapted linear against the reference, output and every gradient.

float64 to 1e-10, float32 to 1e-5, relative to the largest entry.
"""

from types import SimpleNamespace

import pytest
import torch
from golden_layers import DTYPES, make, relative_error, run

from mhr_scale.adapters import routing
from mhr_scale.adapters.collapse import average
from mhr_scale.config import AdapterConfig


@pytest.fixture(params=DTYPES, ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


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
