"""Which slot the rows of a pass read: made once per step, on the host."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mhr_scale.adapters.by_slot import (
    EVEN,
    MOST_MASKED,
    MOST_MASKED_ON_GPU,
    BySlot,
    Masked,
    Span,
    Spans,
)
from mhr_scale.adapters.opaque import Opaque
from mhr_scale.families.fused import is_on_cpu
from mhr_scale.families.sequences import ALIGNED, Stream


@dataclass(frozen=True, kw_only=True)
class RowMap(Opaque):
    """Which slot each batch row uses. `slot_of_row` has one entry per example.

    A pass has one row per example or, consecutive as `repeat_interleave` makes them, so many as
    `rows_per_example` says (beams, answer choices). A single example stands for any number of rows.
    With `streams` it has all examples in one sequence instead: a linear sees one of these streams,
    which are told by their length. In an `is_exact` map a slot's products are its own, to the bit.
    """

    slot_of_row: tuple[int, ...]
    n_slots: int
    rows_per_example: int = 1
    streams: tuple[Stream, ...] = ()
    is_exact: bool = False
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def is_even(self) -> bool:
        """Whether the rows are sorted by slot, with equally many rows each."""
        count, rest = divmod(len(self.slot_of_row), self.n_slots)
        return rest == 0 and self.slot_of_row == tuple(
            slot for slot in range(self.n_slots) for _ in range(count)
        )

    def fits(self, x: Tensor) -> bool:
        """Whether an input (rows, ..., I) is one of these examples.

        Some blocks flatten rows and tokens into one dimension: then x has a multiple of the rows.
        """
        if self.streams:
            return any(stream.n_tokens == _count(x) for stream in self.streams)
        n, n_rows = len(self.slot_of_row), x.shape[0]
        is_flat = x.dim() == 2 and n_rows % n == 0
        return n_rows in (n, n * self.rows_per_example) or n == 1 or is_flat

    def describe_misfit(self, x: Tensor) -> str:
        """What an input that does not fit has, for a message that names its reader."""
        n = len(self.slot_of_row)
        if self.streams:
            lengths = " or ".join(str(stream.n_tokens) for stream in self.streams)
            return (
                f"{_count(x)} tokens under slots made for {n} examples in a sequence of {lengths}; "
                "give `tokens` for every sequence that the model computes"
            )
        return (
            f"{x.shape[0]} rows under slots made for {n} examples; give one task id per example, "
            "or rows_per_example where an example has several rows (beams, answer choices)"
        )

    def by_slot(self, x: Tensor, *, n_columns: int = 0) -> BySlot:
        """How the rows of an input that fits find their slots.

        `n_columns` are the hidden columns of a slot; 0: none, it scales.
        """
        if not self.streams:
            return EVEN
        n_tokens = _count(x)
        spans: BySlot | None = self._made.get(n_tokens)
        if spans is None:
            spans = self._made[n_tokens] = self._find_spans(n_tokens)
        if not isinstance(spans, Spans):
            return spans
        most = MOST_MASKED_ON_GPU
        if is_on_cpu(x):
            most = MOST_MASKED.get(x.dtype, MOST_MASKED[torch.float32])
        size = x.numel() * n_columns * self.n_slots
        if self.is_exact or self.n_slots == 1 or not 0 < size <= most * len(spans.spans):
            return spans
        key = n_tokens, x.dtype
        masked = self._made.get(key)
        if masked is None:
            mask_MU1 = x.new_zeros(n_tokens, self.n_slots, 1)
            for span in spans.spans:  # filled where it lies: a copy from the host would wait
                mask_MU1[span.start : span.stop, span.slot].fill_(1.0)
            masked = self._made[key] = Masked(spans.spans, n_tokens, mask_MU1)
        return masked

    def _find_spans(self, n_tokens: int) -> BySlot:
        """Ranges of tokens; equally many for each slot, in order, need none.

        In an exact map only where each begins at a multiple of `ALIGNED` tokens, as padded rows do:
        one batched product then has the bits of one a slot, for ranks of two or more.
        """
        spans = self._spans(n_tokens)
        length, rest = divmod(n_tokens, self.n_slots)
        even = [Span(n, n * length, (n + 1) * length) for n in range(self.n_slots)]
        is_even = not rest and spans == tuple(even)
        is_aligned = not self.is_exact or length % ALIGNED == 0
        return EVEN if is_even and is_aligned else Spans(spans, n_tokens)

    def _spans(self, n_tokens: int) -> tuple[Span, ...]:
        """Ranges of the tokens of one slot."""
        stream = next(stream for stream in self.streams if stream.n_tokens == n_tokens)
        spans: list[Span] = []
        start = 0
        for slot, count in zip(self.slot_of_row, stream.counts, strict=True):
            stop = start + count
            if spans and spans[-1].slot == slot:
                spans[-1] = Span(slot, spans[-1].start, stop)
            elif count:
                spans.append(Span(slot, start, stop))
            start = stop
        return tuple(spans)


def _count(x: Tensor) -> int:
    """The rows of an input (..., I)."""
    return x.shape[:-1].numel()
