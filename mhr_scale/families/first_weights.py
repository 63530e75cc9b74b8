"""The first numbers of a weight, by the rules of its architecture in transformers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.errors import BackboneError


def make_weight(model: Any, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The weight `name` of a `model` on the meta device, float32: a function of the seed alone.

    The modules it lies in are asked in turn, the innermost first, for what they make of it: some
    make the weights of modules below them anew. Raises `BackboneError` if none makes it.
    """
    place, _, last = name.rpartition(".")
    weight = nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
    shell = copy.copy(model.get_submodule(place))
    shell._parameters = {**shell._parameters, last: weight}
    shells = [shell]
    while place:
        place, _, child = place.rpartition(".")
        parent = copy.copy(model.get_submodule(place))
        parent._modules = {**parent._modules, child: shells[-1]}
        shells.append(parent)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for shell in shells:
            model._init_weights(shell)
    if weight.isnan().any():
        raise BackboneError(
            f"backbone.config: transformers does not say how {name} of a {model.config.model_type} "
            "begins; name a folder with weights"
        )
    return weight.data
