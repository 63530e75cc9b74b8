"""Attention of rows laid flat by torch's variable-length kernel: neither masks nor padding.

On GPUs, in half precision, where each row is one causal text and attention has no terms of its own
(capped scores, position biases). Written by torch's documentation; tested on CPUs against a plain
restatement of the kernel, never run on a GPU.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mhr_scale.families.causal_masks import has_window
from mhr_scale.families.flat import Flat
from mhr_scale.families.fused import is_on_cpu

#: Arguments of transformers' attention functions that the kernel knows nothing of.
OTHER_TERMS = ("softcap", "cache", "position_bias", "s_aux")
#: The widest head of the kernel; widths are multiples of 8.
WIDEST_HEAD = 256


def fits(
    module: Any, flat: Flat, query: Tensor, *, dropout: float, options: Mapping[str, Any]
) -> bool:
    """Whether the kernel computes this attention: `options` are those of the function."""
    width = query.shape[-1]
    return (
        flat.is_causal
        and not is_on_cpu(query)
        and query.dtype in (torch.bfloat16, torch.float16)
        and width <= WIDEST_HEAD
        and width % 8 == 0
        and not dropout
        and all(options.get(name) is None for name in OTHER_TERMS)
        and ("sliding_window" in options or not has_window(module.config))
    )


def attend(
    flat: Flat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of heads (1, H, N, D) under the rows' own masks: (1, N, H, D).

    A token looks back at its row, at `window` positions if there is one, itself among them.
    """
    from torch.nn.attention.varlen import varlen_attn

    stream = flat.stream_of(query.shape[2])
    n_tokens = stream.n_in_rows
    q, k, v = (heads[0, :, :n_tokens].transpose(0, 1) for heads in (query, key, value))
    longest = stream.longest
    found: Any = varlen_attn(
        q,
        k,
        v,
        stream.bounds,
        stream.bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    if n_tokens < stream.n_tokens:  # those behind the rows are read by nobody
        found = torch.cat((found, found.new_zeros(stream.n_tokens - n_tokens, *found.shape[1:])))
    out: Tensor = found[None]
    return out
