"""torch's variable-length attention restated for CPUs, and its calls counted wherever it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import varlen as torch_varlen

from mhr_scale.families import varlen


def restated(q, k, v, bounds_q, bounds_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """The kernel by its documentation: queries (T, H, D) see keys of their own sequence."""
    assert torch.equal(bounds_q, bounds_k)
    assert bounds_q.dtype == torch.int32
    assert int(bounds_q.diff().max()) == max_q == max_k
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    assert right == 0
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    out = torch.zeros_like(q)
    for start, stop in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True):
        places = torch.arange(stop - start)
        distance = places[:, None] - places
        is_open = (distance >= 0) & ((left < 0) | (distance <= left))
        of_q, of_k, of_v = (heads[start:stop].float() for heads in (q, k, v))
        scores = torch.einsum("qhd,khd->hqk", of_q, of_k) * scale
        weights = scores.masked_fill(~is_open, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, of_v).to(out.dtype)
    return out


@contextmanager
def counted(*, is_restated: bool) -> Iterator[list[tuple[int, int]]]:
    """Inside, the windows of every call are listed.

    If it is restated, every attention of rows that are one text each goes there, in any type.
    """
    kernel = restated if is_restated else torch_varlen.varlen_attn
    seen: list[tuple[int, int]] = []

    def attend(*args: Any, **options: Any) -> Any:
        seen.append(options["window_size"])
        return kernel(*args, **options)

    def fits(module: Any, flat: Any, query: Any, **options: Any) -> bool:
        return bool(flat.is_causal)

    with (
        patch.object(torch_varlen, "varlen_attn", attend),
        patch.object(varlen, "fits", fits if is_restated else varlen.fits),
    ):
        yield seen
