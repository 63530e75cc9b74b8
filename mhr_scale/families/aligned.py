"""Masks whose rows begin where attention kernels of a GPU want them to.

torch's memory-efficient kernel reads masks in pieces of 8 numbers. One whose rows do not begin at a
multiple of 8 is copied in front of every layer, and one that does not begin there itself is
refused. So masks are laid into wider rows where they are made, once for all layers. On CPUs nothing
of this is done.

Shape letters: B rows, H heads or 1, L queries, K keys.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.families.fused import is_on_cpu

#: Attention kernels want masks aligned to so many columns.
ALIGNED = 8


def align(mask_BHLK: Tensor) -> Tensor:
    """A mask with the same numbers, whose rows are aligned on a GPU."""
    *strides, last = mask_BHLK.stride()
    if is_on_cpu(mask_BHLK) or (last == 1 and all(stride % ALIGNED == 0 for stride in strides)):
        return mask_BHLK
    return _wide(mask_BHLK)[..., : mask_BHLK.shape[-1]]


def join(masks: Sequence[Tensor]) -> Tensor:
    """Masks (B, H, L, K) flattened one behind another, each with its rows aligned on a GPU."""
    return torch.cat([_wide(mask).flatten() for mask in masks])


def split(joined: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The masks of such shapes that `join` has put together."""
    widths = [n_keys + _margin(joined, n_keys) for *_, n_keys in shapes]
    wide = [(*shape[:-1], width) for shape, width in zip(shapes, widths, strict=True)]
    parts = joined.split([math.prod(shape) for shape in wide])
    return [
        part.view(shape)[..., :n_keys]
        for part, shape, (*_, n_keys) in zip(parts, wide, shapes, strict=True)
    ]


def _wide(mask: Tensor) -> Tensor:
    margin = _margin(mask, mask.shape[-1])
    # contiguous: what is padded may keep its channels last
    return (F.pad(mask, (0, margin)) if margin else mask).contiguous()


def _margin(like: Tensor, n_keys: int) -> int:
    return 0 if is_on_cpu(like) else -n_keys % ALIGNED
