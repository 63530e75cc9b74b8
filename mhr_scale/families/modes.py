"""Modes of a frozen backbone, whatever its family: dropout, recomputation, evaluation."""

from typing import Any

from torch import nn


def set_dropout(model: nn.Module, rate: float | None) -> None:
    """Set every dropout of the backbone; None keeps the configuration's rate."""
    if rate is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in vars(module).items():  # attentions apply their dropout themselves
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, rate)


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
