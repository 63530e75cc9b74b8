"""Rows laid flat: the tokens of several rows one behind another in one sequence, without padding.

Everything that a model computes token by token runs on the tokens alone. Attention is where rows
meet: there queries, keys and values are spread into rectangles, for rows of like lengths one, under
the masks that padded rows have, and what comes out is laid flat again. So a token sees what it sees
in a row of its own, whatever lies beside it, and no operation is spent on padding outside of the
products of attention (`sequences`).

Shape letters: N tokens of all rows, B rows, L width of the rectangle, K keys of a row of it, H
heads, D width of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor

from mhr_scale.families.aligned import align
from mhr_scale.families.sequences import BranchedStream, SpreadStream


@dataclass(frozen=True)
class Flat(AbstractContextManager["Flat"]):
    """The sequences of a pass. Inside the `with` block attention takes them apart.

    The block has the backward pass in it, which may compute activations anew. Streams are told by
    their number of tokens, which differ.
    """

    streams: tuple[SpreadStream | BranchedStream, ...]
    is_causal: bool = False
    """Whether each row is one text, of which a token sees those before it."""

    _cut: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    """Masks that are in use, by their storage, with their pieces."""

    _in_use: ClassVar[list["Flat"]] = []

    def __post_init__(self) -> None:
        lengths = [stream.n_tokens for stream in self.streams]
        assert len(set(lengths)) == len(lengths)

    def to(self, device: torch.device) -> "Flat":
        """The same on `device`."""
        return Flat(tuple(stream.to(device) for stream in self.streams), self.is_causal)

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
        self._cut.clear()

    def stream_of(self, n_tokens: int) -> SpreadStream:
        """The stream of so many tokens, in a rectangle."""
        spread = (stream for stream in self.streams if isinstance(stream, SpreadStream))
        return next(stream for stream in spread if stream.n_tokens == n_tokens)

    def masks_of(
        self, mask: Tensor | None, of_q: SpreadStream, of_k: SpreadStream
    ) -> list[Tensor | None]:
        """What a mask (B, 1, L or 1, K) has for each part; cut once, for all layers.

        Not in a compiled graph, which reads no storage and has what it cuts to itself.
        """
        if mask is None or len(of_q.parts) == 1:
            return [mask] * len(of_q.parts)
        if torch.compiler.is_compiling():
            return _pieces(mask, of_q, of_k)
        storage = mask.untyped_storage()._cdata  # the same for what recomputation makes of it
        if storage not in self._cut:
            self._cut[storage] = mask, _pieces(mask, of_q, of_k)
        return self._cut[storage][1]

    @property
    def branched(self) -> BranchedStream | None:
        """The stream of texts that begin alike; None: there is no such."""
        (first, *_) = self.streams
        return first if isinstance(first, BranchedStream) else None


def _pieces(mask: Tensor, of_q: SpreadStream, of_k: SpreadStream) -> list[Tensor | None]:
    pieces: list[Tensor | None] = []
    for part, keys in zip(of_q.parts, of_k.parts, strict=True):
        piece = mask.index_select(0, part.rows_B)[..., keys.first : keys.stop]
        if mask.shape[2] > 1:
            piece = piece[:, :, part.first : part.stop]
        pieces.append(align(piece.contiguous()))
    return pieces


def in_use() -> Flat | None:
    """The sequences of the pass that is running; None: rows are padded."""
    return Flat._in_use[-1] if Flat._in_use else None


@contextmanager
def using(flat: Flat | None) -> Iterator[None]:
    """Inside, this is what is in use: in a graph, of which it is an argument."""
    if flat is None:
        yield
        return
    Flat._in_use.append(flat)
    try:
        yield
    finally:
        Flat._in_use.pop()


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
        attention_mask: Tensor | None = None,
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
        masks = flat.masks_of(attention_mask, of_q, of_k)
        found = [
            attention(module, *heads_and_mask, *args, **kwargs)[0]
            for heads_and_mask in zip(
                of_q.spread(query), of_k.spread(key), of_k.spread(value), masks, strict=True
            )
        ]
        return of_q.gather(found), None

    return attend
