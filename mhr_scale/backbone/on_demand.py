"""Models whose weights are made when a module runs and freed after it: memory holds one module's.

The parameters of a hollow model stand for weights: they have a shape and a data type, and take no
memory. All their numbers are NaN, so that a weight which nobody fetched shows in what is computed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.adapters.linear import UNITS
from mhr_scale.backbone.blueprint import Blueprint, make_model, plan_copies
from mhr_scale.backbone.weights import read_whole
from mhr_scale.run.runlog import ByteProgress


@dataclass(frozen=True, kw_only=True, slots=True)
class Demanded:
    """A weight that is made whenever a module needs it, and its size where it comes from."""

    name: str
    n_bytes: int
    make: Callable[[], Tensor]


#: Rows of a weight that are rounded at a time.
ROWS = 1024
#: What the parameters of a hollow model stand for.
Weights = dict[nn.Parameter, Demanded]


def hollow_model(
    blueprint: Blueprint,
    dtype: torch.dtype = torch.float32,
    *,
    rounded: torch.dtype | None = None,
) -> tuple[nn.Module, Weights]:
    """The backbone without its weights, to run on the CPU in `dtype`, and those weights.

    They are `rounded` to another data type first, if one is given. Raises `BackboneError` if they
    do not fit their configuration.
    """
    with torch.device("meta"):
        model = make_model(blueprint).to(dtype)
    plan_copies(model, blueprint)
    source = blueprint.source

    def demanded(name: str) -> Demanded:
        return Demanded(
            name=name,
            n_bytes=prod(source.shape(name)) * source.dtype(name).itemsize,
            make=lambda: cast(read_whole(source, name), dtype, rounded=rounded),
        )

    weights = {hollow: demanded(name) for hollow, (name, _) in hollow_out(model, dtype).items()}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    blueprint.family.fill_buffers(model, blueprint.model_config)
    return model, weights


def take_weights(model: nn.Module, *, rounded: torch.dtype | None = None) -> Weights:
    """Take the weights out of a model on the CPU, which will run in float32.

    Each is cast when it is needed, and `rounded` before that if a data type is given. Those that
    are views of mapped files take no memory at all.
    """

    def demanded(name: str, weight: Tensor) -> Demanded:
        return Demanded(
            name=name,
            n_bytes=weight.nbytes,
            make=lambda: cast(weight.detach(), torch.float32, rounded=rounded),
        )

    return {
        hollow: demanded(name, weight)
        for hollow, (name, weight) in hollow_out(model, torch.float32).items()
    }


def cast(weight: Tensor, dtype: torch.dtype, *, rounded: torch.dtype | None = None) -> Tensor:
    """A contiguous weight in `dtype`, by way of `rounded`; memory holds it once, and some rows."""
    if rounded in (None, dtype, weight.dtype):
        return weight.to(dtype).contiguous()
    made = torch.empty(weight.shape, dtype=dtype)
    for rows, row in zip(made.split(ROWS), weight.split(ROWS), strict=True):
        rows.copy_(row.to(rounded))
    return made


def hollow_out(
    model: nn.Module, dtype: torch.dtype
) -> dict[nn.Parameter, tuple[str, nn.Parameter]]:
    """Put parameters without memory in the place of a model's own, tied ones of tied ones.

    Returns the name and the parameter that each stands for.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}

    def hollow(parameter: nn.Parameter) -> nn.Parameter:
        nothing = torch.full((), math.nan, dtype=dtype).expand(parameter.shape)
        return nn.Parameter(nothing, requires_grad=False)

    hollows = {parameter: hollow(parameter) for parameter in names}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = hollows[parameter]
    return {hollow: (names[parameter], parameter) for parameter, hollow in hollows.items()}


@contextmanager
def weights_on_demand(
    model: nn.Module, weights: Mapping[nn.Parameter, Demanded], *, what: str
) -> Iterator[None]:
    """Let every module run with its weights, under a progress bar that is called `what`.

    A module brings its own weights, and one of `UNITS` those of the modules below it as well. Other
    parameters than those of `weights` stay as they are.
    """
    progress = ByteProgress(sum(weight.n_bytes for weight in weights.values()), what=what)
    seen: set[nn.Parameter] = set()
    lent: list[list[tuple[nn.Module, str, nn.Parameter]]] = []  # by the calls that are under way

    def fetch(module: nn.Module, inputs: Any) -> None:
        lent.append([])
        for owner in module.modules() if isinstance(module, UNITS) else (module,):
            for name, parameter in owner._parameters.items():
                if parameter is None or parameter not in weights:
                    continue  # none, or fetched by the unit that this call is a part of
                weight = weights[parameter]
                owner._parameters[name] = nn.Parameter(weight.make(), requires_grad=False)
                lent[-1].append((owner, name, parameter))
                if parameter not in seen:  # tied weights are made several times
                    seen.add(parameter)
                    progress.add(weight.name, weight.n_bytes)

    def drop(module: nn.Module, inputs: Any, output: Any) -> None:
        for owner, name, parameter in lent.pop():
            owner._parameters[name] = parameter

    handles = []
    for module in model.modules():
        if isinstance(module, UNITS) or any(p in weights for p in module._parameters.values()):
            handles += [
                module.register_forward_pre_hook(fetch),
                module.register_forward_hook(drop, always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        progress.close()
