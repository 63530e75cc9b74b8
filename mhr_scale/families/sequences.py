"""Sequences of rows laid flat: their tokens, and the rectangles in which attention has them.

A row is a row of one rectangle (`SpreadStream`), or, without gradients, texts that begin alike have
their beginning in common: then there are several rectangles, in which keys and values stand as
often as they are read (`BranchedStream`).

Shape letters: N tokens of all rows, B rows, L width of a rectangle, K keys of a row of it where
they are others than its queries, H heads, D width of a head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhr_scale.families.aligned import ALIGNED
from mhr_scale.families.sending import send

#: How long a row is at least that attention computes beside a longer one.
ALIKE = 0.75


@dataclass(frozen=True)
class Stream:
    """The tokens of several rows in one sequence, those of a row one behind another.

    `counts` are the tokens of each row, in order; behind them the sequence may have more, up to
    `n_tokens`, which belong to nobody.
    """

    counts: tuple[int, ...]
    n_tokens: int


@dataclass(frozen=True)
class Part:
    """Rows of the rectangle that are alike in length, from one column to another."""

    rows_B: Tensor
    first: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns."""
        return len(self.rows_B), self.stop - self.first

    def to(self, device: torch.device) -> "Part":
        """The same on `device`."""
        return replace(self, rows_B=send(self.rows_B, device))


@dataclass(frozen=True)
class SpreadStream(Stream):
    """A sequence that a model computes, and where its tokens stand in a rectangle `shape` (B, L).

    Attention computes `parts` of the rectangle, one behind another. `places_N` tells of each token
    of a row where in those it stands, `tokens_M` which token each place has, any where there is
    none; None: the sequence is the rectangle.
    """

    shape: tuple[int, int]
    parts: tuple[Part, ...]
    bounds: Tensor
    """Where rows begin and the last one ends, int32."""
    n_in_rows: int
    """Tokens of rows, without those behind them."""
    longest: int
    """Tokens of the longest row."""
    places_N: Tensor | None = None
    tokens_M: Tensor | None = None

    @classmethod
    def of(
        cls,
        is_token_BL: Any,
        *,
        multiple: int = 1,
        other_than: int | None = None,
        groups: Sequence[Sequence[int]] = (),
    ) -> "SpreadStream":
        """The sequence of what is a token in an array (B, L).

        It is filled up to a multiple of so many tokens, and not to `other_than`, from which it is
        told by its length. `groups` are the rows of each part; without any there is one, the
        rectangle.
        """
        import numpy as np

        counts = tuple(int(count) for count in is_token_BL.sum(1))
        n_tokens, shape = -(-sum(counts) // multiple) * multiple, is_token_BL.shape
        if n_tokens == other_than:
            n_tokens += multiple
        bounds = np.cumsum((0, *counts), dtype=np.int32)
        places = np.zeros(sum(counts), dtype=np.int64)
        parts: list[Part] = []
        tokens: list[Any] = []
        for rows in groups or [range(len(counts))]:
            first, stop = _columns(is_token_BL[list(rows)]) if len(groups) > 1 else (0, shape[1])
            own = is_token_BL[list(rows), first:stop]
            numbers = np.zeros(own.size, dtype=np.int64)
            of_rows = [np.arange(bounds[row], bounds[row + 1]) for row in rows]
            numbers[np.flatnonzero(own)] = np.concatenate(of_rows)
            places[np.concatenate(of_rows)] = np.flatnonzero(own) + sum(map(len, tokens))
            tokens.append(numbers)
            parts.append(Part(torch.from_numpy(np.array(rows)), first, stop))
        found = cls(
            counts,
            n_tokens,
            shape,
            tuple(parts),
            torch.from_numpy(bounds),
            n_in_rows=sum(counts),
            longest=max(counts),
        )
        if len(parts) == 1 and n_tokens == is_token_BL.size and is_token_BL.all():
            return found
        tokens_M = torch.from_numpy(np.concatenate(tokens))
        return replace(found, places_N=torch.from_numpy(places), tokens_M=tokens_M)

    def to(self, device: torch.device) -> "SpreadStream":
        """The same on `device`."""
        bounds, parts = send(self.bounds, device), self.parts
        if len(parts) > 1:
            parts = tuple(part.to(device) for part in parts)
        if self.places_N is None or self.tokens_M is None:
            return replace(self, bounds=bounds)
        return replace(
            self,
            parts=parts,
            bounds=bounds,
            places_N=send(self.places_N, device),
            tokens_M=send(self.tokens_M, device),
        )

    def spread(self, heads_1HND: Tensor) -> list[Tensor]:
        """The heads of a sequence (1, H, N, D) in each part (B, H, L, D), any where padded."""
        heads_NHD = heads_1HND[0].transpose(0, 1)
        if self.places_N is not None:
            heads_NHD = _Spread.apply(heads_NHD, self.places_N, self.tokens_M)
        shapes = [part.shape for part in self.parts]
        parts = [heads_NHD]
        if len(shapes) > 1:
            parts = list(heads_NHD.split([math.prod(shape) for shape in shapes]))
        return [
            part.unflatten(0, shape).transpose(1, 2)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def gather(self, heads_BLHD: Sequence[Tensor]) -> Tensor:
        """What the parts (B, L, H, D) have at the tokens of the sequence: (1, N, H, D)."""
        flat = [heads.flatten(0, 1) for heads in heads_BLHD]
        heads_NHD = flat[0] if len(flat) == 1 else torch.cat(flat)
        if self.places_N is not None:
            heads_NHD = _Gather.apply(heads_NHD, self.places_N, self.n_tokens)
        return heads_NHD[None]


def take(array_BL: Any, is_token_BL: Any, n_tokens: int) -> Any:
    """What an array (B, L) has at the tokens, and zeros behind them: (1, N)."""
    import numpy as np

    taken = np.zeros((1, n_tokens), dtype=array_BL.dtype)
    taken[0, : is_token_BL.sum()] = array_BL[is_token_BL]
    return taken


def _columns(is_token_BL: Any) -> tuple[int, int]:
    """The columns from the first token to the last, a multiple of `ALIGNED` where there is room."""
    columns, width = is_token_BL.any(0).nonzero()[0], is_token_BL.shape[1]
    first, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 1)
    size = -(-(stop - first) // ALIGNED) * ALIGNED
    stop = min(width, first + size)
    return max(0, stop - size), stop


def group_alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows by length, none of a group much shorter than its longest."""
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not groups or lengths[row] < ALIKE * longest:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]


@dataclass(frozen=True)
class Rectangle:
    """Queries of tokens (B, L) over keys (B, K), which stand in any number of rectangles.

    The keys of a row are texts that branch off one another, depth first: a key is open to itself
    and to what stands behind it, up to its end. Where no query or key is stands any token.
    """

    queries_BL: Tensor
    keys_BK: Tensor
    places_BL: Tensor
    """Where each query stands among the keys of its row."""
    ends_BK: Tensor

    def is_open(self) -> Tensor:
        """Whether a query may look at a key: (B, L, K)."""
        place = self.places_BL[:, :, None]
        key = torch.arange(self.keys_BK.shape[1], device=place.device)
        return (key <= place) & (place < self.ends_BK[:, None, :])

    def to(self, device: torch.device) -> "Rectangle":
        """The same on `device`."""
        tensors = (self.queries_BL, self.keys_BK, self.places_BL, self.ends_BK)
        return Rectangle(*(send(tensor, device) for tensor in tensors))


@dataclass(frozen=True)
class BranchedStream(Stream):
    """A sequence whose tokens may stand in several texts, which attention has in rectangles.

    Each token is a query of one of them: `places_N` tells where, in all rectangles one behind
    another.
    """

    rectangles: tuple[Rectangle, ...]
    places_N: Tensor

    def to(self, device: torch.device) -> "BranchedStream":
        """The same on `device`."""
        rectangles = tuple(rectangle.to(device) for rectangle in self.rectangles)
        places_N = send(self.places_N, device)
        return replace(self, rectangles=rectangles, places_N=places_N)

    def attend(
        self, attention: Callable[..., Tensor], heads_1HND: Sequence[Tensor], masks: Tensor
    ) -> Tensor:
        """An attention of q, k, v and mask in all rectangles: (1, N, H, D).

        `masks` are those of the rectangles (B, 1, L, K), flattened, one behind another.
        """
        q_NHD, k_NHD, v_NHD = (heads[0].transpose(0, 1) for heads in heads_1HND)
        found, masks, start = [], masks.flatten(), 0
        for part in self.rectangles:
            shape = len(part.keys_BK), 1, part.queries_BL.shape[1], part.keys_BK.shape[1]
            stop = start + math.prod(shape)
            q = _stand(q_NHD, part.queries_BL)
            k, v = (_stand(heads, part.keys_BK) for heads in (k_NHD, v_NHD))
            found.append(attention(q, k, v, masks[start:stop].view(shape)).flatten(0, 1))
            start = stop
        return torch.cat(found).index_select(0, self.places_N)[None]


def _stand(heads_NHD: Tensor, tokens_BL: Tensor) -> Tensor:
    """The heads of some tokens, (B, H, L, D)."""
    return (
        heads_NHD.index_select(0, tokens_BL.flatten()).unflatten(0, tokens_BL.shape).transpose(1, 2)
    )


class _Spread(torch.autograd.Function):
    """Tokens to their places. Padding has those of some token, which masks hide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places_N: Tensor, tokens_M: Tensor) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.n_tokens = len(x)
        return x.index_select(0, tokens_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places_N,) = ctx.saved_tensors
        return _take(gradient, places_N, ctx.n_tokens), None, None


class _Gather(torch.autograd.Function):
    """Tokens from their places, and zeros behind them up to so many rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places_N: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.size = len(x)
        return _take(x, places_N, n_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places_N,) = ctx.saved_tensors
        spread = gradient.new_zeros(ctx.size, *gradient.shape[1:])
        return spread.index_copy_(0, places_N, gradient[: len(places_N)]), None, None


def _take(x: Tensor, places_N: Tensor, n_tokens: int) -> Tensor:
    if len(places_N) == n_tokens:
        return x.index_select(0, places_N)
    taken = x.new_zeros(n_tokens, *x.shape[1:])
    taken[: len(places_N)] = x.index_select(0, places_N)
    return taken
