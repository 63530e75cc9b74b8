"""Numbers of the device beside those they are to be, and how far they may be apart.

A distance is a share of the largest number compared (`furthest`), or of all of them (`distance`).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
from board import Found, Scale
from torch import Tensor

CPU = torch.device("cpu")
#: By type, twice what a rounding to it changes at most, as a share of the number.
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}


def without_tf32() -> None:
    """Products of float32 are of float32 from here on, as they are by torch's default."""
    torch.set_float32_matmul_precision("highest")


def where(scale: Scale) -> AbstractContextManager[None]:
    """The block in which what asks for this process's device gets that of the scale."""
    return nullcontext() if scale.on_gpu else on_cpu()


@contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, what asks for this process's device gets the CPU."""
    with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        yield


def furthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference, as a share of the largest number of its tensor."""
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    worst = 0.0
    for name, theirs in expected.items():
        ours, theirs = found[name].cpu().double(), theirs.cpu().double()
        largest = float(theirs.abs().max())
        assert largest > 0.0, f"{name} is trivial"
        worst = _larger(worst, float((ours - theirs).abs().max()) / largest)
    return worst


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The norm of the difference, as a share of the norm: of the tensor where it is largest."""
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    worst = 0.0
    for name, theirs in expected.items():
        ours, theirs = found[name].cpu().double(), theirs.cpu().double()
        worst = _larger(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


def furthest_of_numbers(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference of two series, as a share of the number it is of."""
    pairs = list(zip(found, expected, strict=True))
    worst = 0.0
    for ours, theirs in pairs:
        worst = _larger(worst, abs(ours - theirs) / abs(theirs))
    return worst


def share_of_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The share of tensors that are equal bit for bit."""
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    return sum(torch.equal(found[n].cpu(), expected[n].cpu()) for n in expected) / len(expected)


def held(values: Mapping[str, float | int | str | None], most: float, goal: str) -> Found:
    """An entry all of whose distances are to be at most `most`, and are finite numbers."""
    distances = [value for value in values.values() if isinstance(value, float)]
    return Found(values, holds=all(value <= most for value in distances), goal=goal)


def _larger(one: float, other: float) -> float:
    """The larger one; no number counts as the largest."""
    return one if one >= other or one != one else other
