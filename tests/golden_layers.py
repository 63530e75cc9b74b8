"""One adapted linear with the numbers of a golden file (`golden_vectors`), on any device.

What is found comes back to the CPU, under the names that the file has.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.adapters.sites import Site
from mhr_scale.config import AdapterConfig

CPU = torch.device("cpu")
#: Types in which a layer computes, and how far it may be from the reference.
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def relative_error(value: Tensor, golden: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float((value.double() - golden).abs().max() / golden.abs().max().clamp(min=1e-30))


def make(layer: SimpleNamespace, dtype: torch.dtype, device: torch.device = CPU) -> Adapter:
    """An adapter of one linear, bound to it, with the file's numbers."""
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
    base.to(device)
    return adapter.to(device)


def run(adapter: Adapter, layer: SimpleNamespace, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of every tensor."""
    tensors, device = layer.tensors, adapter.linears[0].weight.device
    x = tensors["x"].to(device, dtype).requires_grad_()
    with adapter.slots(tensors["task_ids"]) as slots:
        y = adapter.linears[0](x)
        slots.backward((y * tensors["cotangent"].to(device, dtype)).sum())
    stack = adapter.inventory.stacks[0]
    found = {"y": y.detach(), "grad_x": x.grad}
    for side in "AB":
        found[f"grad_{side}"] = adapter.inventory.stacked(stack, side).grad[0]
    if adapter.routing_logits is not None:
        found["grad_Z"] = adapter.routing_logits.grad[:, 0]
    return {name: tensor.cpu() for name, tensor in found.items()}
