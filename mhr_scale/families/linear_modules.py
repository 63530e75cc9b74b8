"""Which modules are linears that adapters can be attached to, and how their weights lie."""

from typing import Any

from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear's weight lies as (in, out): transformers' `Conv1D`, as in GPT-2."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_widths(module: nn.Module) -> tuple[int, int] | None:
    """The (in, out) widths of a linear; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        weight: Any = module.weight
        n_in, n_out = getattr(weight, "ds_shape", weight.shape)  # the whole of a sharded one
        return int(n_in), int(n_out)
    return None
