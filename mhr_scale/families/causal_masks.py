"""Masks of rows whose answers are branches behind one prompt.

Shape letters: B rows, L positions of a row.
"""

from typing import Any

import torch
from torch import Tensor


def make_masks(
    config: Any, branches_BL: Tensor, positions_BL: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Additive masks (B, 1, L, L): 0 where a token may look, the smallest number elsewhere.

    `branches_BL` is 0 in a prompt, 1, 2, ... in its answers, -1 where padded; `positions_BL` is
    where a token stands in the text that it belongs to. A token looks at the prompt and at its own
    answer before it, in layers with a sliding window at those of the window's positions. Where a
    configuration lists the kinds of its layers, a mask for each kind.
    """
    is_open = _is_open(branches_BL)
    window = _window_of(config)
    near = is_open if window is None else is_open & _is_near(positions_BL, window)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return additive(near, dtype)
    full = additive(is_open, dtype)
    found = {"full_attention": full, "sliding_attention": full}
    if near is not is_open:
        found["sliding_attention"] = additive(near, dtype)
    return found


def _is_open(branches_BL: Tensor) -> Tensor:
    """Whether a token (row of the matrix) may look at another: (B, L, L), windows apart."""
    query, key = branches_BL[:, :, None], branches_BL[:, None, :]
    # padding looks at itself, for a softmax over nothing is no number
    return (((key == query) | (key == 0)) & ((key >= 0) | (query < 0))).tril()


def _is_near(positions_BL: Tensor, window: int) -> Tensor:
    return positions_BL[:, :, None] - positions_BL[:, None, :] < window


def has_window(config: Any) -> bool:
    """Whether a configuration sets a window of layers that look back so many positions only."""
    window = getattr(config, "sliding_window", None)
    return window is not None and bool(getattr(config, "use_sliding_window", True))


def _window_of(config: Any) -> int | None:
    """That window; None if there is none."""
    return config.sliding_window if has_window(config) else None


def additive(is_open: Tensor, dtype: torch.dtype) -> Tensor:
    """What is open (B, L, L) as a mask (B, 1, L, L): 0 there, the smallest number elsewhere.

    Not boolean: eager attention would add it up as zeros and ones.
    """
    shut = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=is_open.device)
    return torch.where(is_open, torch.zeros_like(shut), shut)[:, None]
