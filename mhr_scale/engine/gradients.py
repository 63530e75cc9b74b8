"""How gradients run through a frozen backbone: the order of their sums, and how far they reach."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.adapters.linear import Siblings
from mhr_scale.families.family import Family


class _Joint(torch.autograd.Function):
    """Identity; the gradients of all uses of its output are summed before they flow on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def order_gradients(model: Any, family: Family) -> None:
    """Sum gradients at the inputs of blocks, norms and siblings, as ZeRO-3's hooks do.

    Floating-point addition is not associative. In this order a replicated backbone computes the
    same bits as a sharded one, so that runs of both placements can be compared exactly.
    """

    def join(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            _Joint.apply(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs
        )

    stacks = family.blocks(model.config).values()
    blocks = [model.get_submodule(name) for stack in stacks for name in stack.list_modules()]
    siblings = [module for module in model.modules() if isinstance(module, Siblings)]
    for module in _distinct([*blocks, *family.norms(model), *siblings]):
        module.register_forward_pre_hook(join)


def require_input_gradients(model: nn.Module, family: Family) -> None:
    """Let gradients flow to the embeddings, so that a backward pass runs through every module."""

    def flow(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    for module in _distinct(family.embeddings(model)):
        module.register_forward_hook(flow)


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(modules))
