"""Modes of a frozen backbone: dropout, recomputation, faster parts, the order of gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.config import BackboneConfig


def set_dropout(model: nn.Module, rate: float | None) -> None:
    """Set every dropout of the backbone; None keeps the configuration's rate."""
    if rate is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(getattr(module, "dropout", None), float):
            setattr(module, "dropout", rate)  # noqa: B010 (T5Attention applies it itself)


def fuse(model: nn.Module, config: BackboneConfig) -> None:
    """Put the fused parts of T5 in place that `config` switches on."""
    from mhr_scale.families import t5_fused

    t5_fused.install(model, config)


def set_recompute(model: Any, mode: str) -> None:
    """Switch activation checkpointing on (`reentrant`, `non_reentrant`) or leave it off."""
    if mode == "none":
        return
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": mode == "reentrant"}
    )
    model.enable_input_require_grads()
    model.config.use_cache = False


def evaluate(model: nn.Module) -> None:
    """Put the model into evaluation mode; blocks that recompute activations go on doing so.

    Their own flag decides that and nothing else: dropout and routing noise lie in modules below.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True


def require_input_gradients(model: Any) -> None:
    """Let gradients flow to the embeddings, so that a backward pass meets every module."""

    def flow(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == model.config.d_model:
            module.register_forward_hook(flow)


class _Joint(torch.autograd.Function):
    """Identity; the gradients of everything behind it are summed before they go on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def order_gradients(model: nn.Module) -> None:
    """Sum gradients at the inputs of blocks, norms and siblings, as ZeRO-3's hooks do.

    Addition of floats has an order. With this one a replicated backbone gives the very bits that a
    sharded one gives, and runs of both placements can be compared exactly.
    """

    def join(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            _Joint.apply(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs
        )

    for module in model.modules():
        if type(module).__name__.endswith(("LayerNorm", "Block", "Siblings")):
            module.register_forward_pre_hook(join)
