"""Masks of rows whose answers are branches behind one prompt.

Shape letters: B rows, L positions of a row, K positions that it looks at.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mhr_scale.families.aligned import align
from mhr_scale.families.packed import Packed
from mhr_scale.families.sequences import BranchedStream

#: A mask for all layers, or one for each kind of them, as a model takes it.
Masks: TypeAlias = Tensor | dict[str, Tensor]


def masks_of(model: Any, packed: Packed) -> Masks:
    """The masks of packed rows, in the data type of the model's states."""
    inputs, dtype = packed.inputs, model.get_input_embeddings().weight.dtype
    stream = None if packed.flat is None else packed.flat.branched
    if stream is not None:
        return masks_of_branches(model.config, stream, inputs["position_ids"][0], dtype)
    columns = inputs["columns" if "columns" in inputs else "position_ids"]
    return make_masks(model.config, inputs["branches"], columns, dtype)


def make_masks(config: Any, branches_BL: Tensor, positions_BL: Tensor, dtype: torch.dtype) -> Masks:
    """Masks (B, 1, L, L) of rows whose answers are branches behind one prompt (`masks_over`).

    `branches_BL` is 0 in a prompt, 1, 2, ... in its answers, -1 where padded. A token looks at the
    prompt and at its own answer before it.
    """
    is_open = _is_open(branches_BL)
    return masks_over(config, is_open, positions_BL, positions_BL, dtype)


def _is_open(branches_BL: Tensor) -> Tensor:
    """Whether a token (row of the matrix) may look at another: (B, L, L), windows apart."""
    query, key = branches_BL[:, :, None], branches_BL[:, None, :]
    # padding looks at itself, for a softmax over nothing is no number
    return (((key == query) | (key == 0)) & ((key >= 0) | (query < 0))).tril()


def masks_over(
    config: Any,
    is_open_BLK: Tensor,
    positions_BL: Tensor,
    positions_BK: Tensor,
    dtype: torch.dtype,
) -> Masks:
    """Additive masks (B, 1, L, K): 0 where a token may look, the smallest number elsewhere.

    Positions are where a token stands in the text that it belongs to. A token looks at what is
    open, in layers with a sliding window at those of the window's positions. Where a configuration
    lists the kinds of its layers, a mask for each kind.
    """
    window = _window_of(config)
    near = is_open_BLK
    if window is not None:
        near = is_open_BLK & (positions_BL[:, :, None] - positions_BK[:, None, :] < window)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return additive(near, dtype)
    full = additive(is_open_BLK, dtype)
    found = {"full_attention": full, "sliding_attention": full}
    if near is not is_open_BLK:
        found["sliding_attention"] = additive(near, dtype)
    return found


def masks_of_branches(
    config: Any, stream: BranchedStream, positions_N: Tensor, dtype: torch.dtype
) -> Masks:
    """Those of all rectangles of a sequence, flattened, one behind another (1, 1, 1, M)."""
    parts: list[Any] = [
        masks_over(
            config,
            part.is_open(),
            positions_N[part.queries_BL],
            positions_N[part.keys_BK],
            dtype,
        )
        for part in stream.rectangles
    ]
    if not isinstance(parts[0], dict):
        return _join(parts)
    found: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for kind, mask in parts[0].items():  # layers of several kinds may have one mask
        if id(mask) not in made:
            made[id(mask)] = _join([part[kind] for part in parts])
        found[kind] = made[id(mask)]
    return found


def _join(masks: Sequence[Any]) -> Tensor:
    return torch.cat([mask.flatten() for mask in masks])[None, None, None]


def has_window(config: Any) -> bool:
    """Whether a configuration sets a window of layers that look back so many positions only."""
    window = getattr(config, "sliding_window", None)
    return window is not None and bool(getattr(config, "use_sliding_window", True))


def _window_of(config: Any) -> int | None:
    """That window; None if there is none."""
    return config.sliding_window if has_window(config) else None


def additive(is_open: Tensor, dtype: torch.dtype) -> Tensor:
    """What is open (B, L, K) as a mask (B, 1, L, K): 0 there, the smallest number elsewhere.

    Not boolean: eager attention would add it up as zeros and ones.
    """
    shut = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=is_open.device)
    return align(torch.where(is_open, torch.zeros_like(shut), shut)[:, None])
