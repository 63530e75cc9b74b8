"""Rows laid flat: the tokens of several rows one behind another in one sequence, without padding.

Everything that a model computes token by token runs on the tokens alone. Attention is where rows
meet: there queries, keys and values are spread into a rectangle, a row of it for each row, under
the masks that padded rows have, and what comes out is laid flat again. So a token sees what it sees
in a row of its own, whatever lies beside it, and no operation is spent on padding outside of the
products of attention. Without gradients, texts that begin alike may have their beginning in common:
then there are several rectangles, in which keys and values stand as often as they are read.

Shape letters: N tokens of all rows, B rows, L width of the rectangle, K keys of a row of it where
they are others than its queries, H heads, D width of a head.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Stream:
    """The tokens of several rows in one sequence, those of a row one behind another.

    `counts` are the tokens of each row, in order; behind them the sequence may have more, up to
    `n_tokens`, which belong to nobody.
    """

    counts: tuple[int, ...]
    n_tokens: int


@dataclass(frozen=True)
class SpreadStream(Stream):
    """A sequence that a model computes, and where its tokens stand in a rectangle `shape` (B, L).

    `places` tells it of each token of a row, by row and column in one; None: the sequence is the
    rectangle. `places_N` are the same where the model is; `tokens_M` (B * L) is the token of each
    place, any where there is none.
    """

    shape: tuple[int, int]
    places: Any
    bounds: Tensor
    """Where rows begin and the last one ends, int32."""
    places_N: Tensor | None = None
    tokens_M: Tensor | None = None

    @classmethod
    def of(
        cls, is_token_BL: Any, *, multiple: int = 1, other_than: int | None = None
    ) -> "SpreadStream":
        """The sequence of what is a token in an array (B, L).

        It is filled up to a multiple of so many tokens, and not to `other_than`, from which it is
        told by its length.
        """
        import numpy as np

        counts = tuple(int(count) for count in is_token_BL.sum(1))
        n_tokens = -(-sum(counts) // multiple) * multiple
        if n_tokens == other_than:
            n_tokens += multiple
        bounds = torch.from_numpy(np.cumsum((0, *counts), dtype=np.int32))
        if n_tokens == is_token_BL.size and is_token_BL.all():
            return cls(counts, n_tokens, is_token_BL.shape, None, bounds)
        places = np.flatnonzero(is_token_BL)
        tokens = np.zeros(is_token_BL.size, dtype=np.int64)
        tokens[places] = np.arange(len(places))
        indices = torch.from_numpy(places), torch.from_numpy(tokens)
        return cls(counts, n_tokens, is_token_BL.shape, places, bounds, *indices)

    def take(self, array_BL: Any) -> Any:
        """What an array (B, L) has at the tokens, and zeros behind them: (1, N)."""
        import numpy as np

        if self.places is None:
            return array_BL.reshape(1, -1)
        taken = np.zeros((1, self.n_tokens), dtype=array_BL.dtype)
        taken[0, : len(self.places)] = array_BL.reshape(-1)[self.places]
        return taken

    def tokens_at(self, columns_BX: Any) -> Any:
        """The tokens in some columns of each row of the rectangle, any where there is none."""
        import numpy as np

        places_BX = columns_BX + np.arange(len(columns_BX))[:, None] * self.shape[1]
        return places_BX if self.places is None else np.searchsorted(self.places, places_BX)

    def to(self, device: torch.device) -> "SpreadStream":
        """The same on `device`."""
        bounds = self.bounds.to(device, non_blocking=True)
        if self.places_N is None or self.tokens_M is None:
            return replace(self, bounds=bounds)
        return replace(
            self,
            bounds=bounds,
            places_N=self.places_N.to(device, non_blocking=True),
            tokens_M=self.tokens_M.to(device, non_blocking=True),
        )

    def spread(self, heads_1HND: Tensor) -> Tensor:
        """The heads of a sequence (1, H, N, D) in the rectangle (B, H, L, D), any where padded."""
        heads_NHD = heads_1HND[0].transpose(0, 1)
        if self.places_N is not None:
            heads_NHD = _Spread.apply(heads_NHD, self.places_N, self.tokens_M)
        return heads_NHD.unflatten(0, self.shape).transpose(1, 2)

    def gather(self, heads_BLHD: Tensor) -> Tensor:
        """What a rectangle (B, L, H, D) has at the tokens of the sequence: (1, N, H, D)."""
        heads_NHD = heads_BLHD.flatten(0, 1)
        if self.places_N is not None:
            heads_NHD = _Gather.apply(heads_NHD, self.places_N, self.n_tokens)
        return heads_NHD[None]


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
        place, key = (
            self.places_BL[:, :, None],
            torch.arange(self.keys_BK.shape[1]).to(self.keys_BK),
        )
        return (key <= place) & (place < self.ends_BK[:, None, :])

    def to(self, device: torch.device) -> "Rectangle":
        """The same on `device`."""
        tensors = (self.queries_BL, self.keys_BK, self.places_BL, self.ends_BK)
        return Rectangle(*(tensor.to(device, non_blocking=True) for tensor in tensors))


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
        places_N = self.places_N.to(device, non_blocking=True)
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


@dataclass(frozen=True)
class Flat(AbstractContextManager["Flat"]):
    """The sequences of a pass. Inside the `with` block attention takes them apart.

    The block has the backward pass in it, which may compute activations anew. Streams are told by
    their number of tokens, which differ.
    """

    streams: tuple[SpreadStream | BranchedStream, ...]
    is_causal: bool = False
    """Whether each row is one text, of which a token sees those before it."""

    _in_use: ClassVar[list["Flat"]] = []

    def __post_init__(self) -> None:
        lengths = [stream.n_tokens for stream in self.streams]
        assert len(set(lengths)) == len(lengths)

    def to(self, device: torch.device) -> "Flat":
        """The same on `device`."""
        return replace(self, streams=tuple(stream.to(device) for stream in self.streams))

    def __enter__(self) -> "Flat":
        Flat._in_use.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Flat._in_use.pop()

    def stream_of(self, n_tokens: int) -> SpreadStream:
        """The stream of so many tokens, in a rectangle."""
        spread = (stream for stream in self.streams if isinstance(stream, SpreadStream))
        return next(stream for stream in spread if stream.n_tokens == n_tokens)

    @property
    def branched(self) -> BranchedStream | None:
        """The stream of texts that begin alike; None: there is no such."""
        (first, *_) = self.streams
        return first if isinstance(first, BranchedStream) else None


def in_use() -> Flat | None:
    """The sequences of the pass that is running; None: rows are padded."""
    return Flat._in_use[-1] if Flat._in_use else None


def apart(attention: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    """An attention function of transformers that takes rows laid flat too.

    It is called with the module, q (1, H, N, D), k, v and a mask of the rectangle, or of all
    rectangles (`BranchedStream.attend`), and returns (1, N, H, D).
    """

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        flat = in_use()
        if flat is None:
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        branched = flat.branched
        if branched is not None:
            assert attention_mask is not None

            def alone(*heads_and_mask: Tensor) -> Tensor:
                return attention(module, *heads_and_mask, *args, **kwargs)[0]

            return branched.attend(alone, (query, key, value), attention_mask), None
        of_q, of_k = flat.stream_of(query.shape[2]), flat.stream_of(key.shape[2])
        found, weights = attention(
            module,
            of_q.spread(query),
            of_k.spread(key),
            of_k.spread(value),
            attention_mask,
            *args,
            **kwargs,
        )
        return of_q.gather(found), weights

    return attend
