"""How the rows of an input find the A and B of their own slot: three ways, one set of products.

| way | rows | low-rank products |
|---|---|---|
| `Even` | equally many consecutive rows for each slot | one batched product |
| `Spans` | ranges of rows, whatever their lengths | a product for each range |
| `Masked` | the same, few slots of low rank | one product with all slots side by side, of whose |
| | | columns each row keeps those of its slot |

All three compute the same; `Spans` gives a slot the very bits that it would have alone.

Shape letters: M rows (tokens of all examples), U slots, I in features, O out features, R rank, X
hidden columns of all siblings.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

#: Numbers of x times hidden columns of all slots, for each range of rows, up to which one product
#: of all slots is faster than one for each range: measured on a CPU (tests/benchmarks/README.md),
#: where short products are slow in bfloat16; for GPUs reckoned, from 5 us for a launch and 300
#: Tflop/s.
MOST_MASKED = {torch.float32: 100_000, torch.bfloat16: 4_000_000}
MOST_MASKED_ON_GPU = 700_000_000


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one slot."""

    slot: int
    start: int
    stop: int


class BySlot(ABC):
    """Products of rows with their slots' sides. Hidden columns are what `down` makes of rows."""

    @abstractmethod
    def rows(self, tensor: Tensor, side: Tensor) -> Tensor:
        """The rows of x or y as the other products take them, `side` being A or a B."""

    @abstractmethod
    def down(self, x: Tensor, a_UIX: Tensor) -> Tensor:
        """The hidden columns x A[slot]."""

    def columns(self, h: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        """The hidden columns of each sibling."""
        return [h] if len(ranks) == 1 else list(h.split(list(ranks), -1))

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The reverse of `columns`."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)

    def narrowed(self, h: Tensor) -> Tensor:
        """The hidden columns (M, X) that rows have of their own slots."""
        return h.flatten(0, -2)

    def widened(self, h_MX: Tensor, a_UIX: Tensor) -> Tensor:
        """The reverse of `narrowed`."""
        return h_MX

    @abstractmethod
    def add_up_(self, total: Tensor, h: Tensor, b_URO: Tensor) -> None:
        """Add h B[slot] to `total` in place."""

    @abstractmethod
    def pull(self, g: Tensor, b_URO: Tensor) -> Tensor:
        """Gradient of a sibling's hidden columns: g B[slot]^T."""

    @abstractmethod
    def add_down_(self, total: Tensor, dh: Tensor, a_UIX: Tensor) -> None:
        """Add dh A[slot]^T to `total` in place."""

    @abstractmethod
    def grad_a(self, x: Tensor, dh: Tensor, a_UIX: Tensor) -> Tensor:
        """Gradient of A, by slot."""

    @abstractmethod
    def grad_b(self, h: Tensor, g: Tensor, b_URO: Tensor) -> Tensor:
        """Gradient of a sibling's B, by slot."""

    @abstractmethod
    def times(self, y: Tensor, l_UO: Tensor) -> Tensor:
        """y * l[slot], a tensor of its own."""

    @abstractmethod
    def sums(self, y: Tensor, l_UO: Tensor) -> Tensor:
        """Sums of each slot's rows, (U, O)."""


class Even(BySlot):
    """Equally many consecutive rows for each slot; without U in a side there is one slot."""

    @override
    def rows(self, tensor: Tensor, side: Tensor) -> Tensor:
        return tensor.reshape(*side.shape[:-2], -1, tensor.shape[-1])

    @override
    def down(self, x: Tensor, a_UIX: Tensor) -> Tensor:
        return _multiply(x, a_UIX)

    @override
    def widened(self, h_MX: Tensor, a_UIX: Tensor) -> Tensor:
        return h_MX.unflatten(0, (*a_UIX.shape[:-2], -1))

    @override
    def add_up_(self, total: Tensor, h: Tensor, b_URO: Tensor) -> None:
        _add_product_(total, h, b_URO)

    @override
    def pull(self, g: Tensor, b_URO: Tensor) -> Tensor:
        return _multiply(g, b_URO.mT)

    @override
    def add_down_(self, total: Tensor, dh: Tensor, a_UIX: Tensor) -> None:
        _add_product_(total, dh, a_UIX.mT)

    @override
    def grad_a(self, x: Tensor, dh: Tensor, a_UIX: Tensor) -> Tensor:
        return _multiply(x.mT, dh)

    @override
    def grad_b(self, h: Tensor, g: Tensor, b_URO: Tensor) -> Tensor:
        return _multiply(h.mT, g)

    @override
    def times(self, y: Tensor, l_UO: Tensor) -> Tensor:
        if l_UO.dim() == 1:
            return y * l_UO
        scaled = y.reshape(l_UO.shape[0], -1, y.shape[-1]) * l_UO[:, None]
        whole: Tensor = torch.ops.aten._unsafe_view(scaled, y.shape)
        return whole

    @override
    def sums(self, y: Tensor, l_UO: Tensor) -> Tensor:
        if l_UO.dim() == 1:
            return y.sum(tuple(range(y.dim() - 1)))
        return y.reshape(l_UO.shape[0], -1, l_UO.shape[1]).sum(1)


#: The way of rows that every slot has equally many of.
EVEN = Even()


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of slots' rows to `total`, whose rows have to be a view of it."""
    rows = total.view(*right.shape[:-2], -1, total.shape[-1])
    if left.dim() == 2:
        rows.addmm_(left, right)
    else:
        rows.baddbmm_(left, right)


@dataclass(frozen=True)
class Spans(BySlot):
    """Ranges of rows, one behind another; rows behind them read no slot, and stay as they are."""

    spans: tuple[Span, ...]
    n_rows: int
    """All rows, those of no span included."""

    @property
    def is_covering(self) -> bool:
        """Whether every row reads a slot."""
        return sum(span.stop - span.start for span in self.spans) == self.n_rows

    @override
    def rows(self, tensor: Tensor, side: Tensor) -> Tensor:
        return _flat(tensor)

    @override
    def down(self, x: Tensor, a_UIX: Tensor) -> Tensor:
        return self._products(x, _by_number(a_UIX), a_UIX.shape[-1])

    @override
    def add_up_(self, total: Tensor, h: Tensor, b_URO: Tensor) -> None:
        self._add_products_(total, h, _by_number(b_URO))

    @override
    def pull(self, g: Tensor, b_URO: Tensor) -> Tensor:
        return self._products(g, [b.mT for b in _by_number(b_URO)], b_URO.shape[-2])

    @override
    def add_down_(self, total: Tensor, dh: Tensor, a_UIX: Tensor) -> None:
        self._add_products_(total, dh, [a.mT for a in _by_number(a_UIX)])

    @override
    def grad_a(self, x: Tensor, dh: Tensor, a_UIX: Tensor) -> Tensor:
        return self._gradient(x, dh, a_UIX)

    @override
    def grad_b(self, h: Tensor, g: Tensor, b_URO: Tensor) -> Tensor:
        return self._gradient(h, g, b_URO)

    @override
    def times(self, y: Tensor, l_UO: Tensor) -> Tensor:
        scaled = torch.empty(
            y.shape, dtype=torch.promote_types(y.dtype, l_UO.dtype), device=y.device
        )
        into, rows = _flat(scaled), _flat(y)
        vectors = _by_number(l_UO, dims=1)
        if not self.is_covering:
            into.copy_(rows)
        for span, of_slot in self._each(rows):
            torch.mul(of_slot, vectors[span.slot], out=into[span.start : span.stop])
        return scaled

    @override
    def sums(self, y: Tensor, l_UO: Tensor) -> Tensor:
        sums = torch.zeros_like(l_UO, dtype=y.dtype)
        by_number = _by_number(sums, dims=1)
        for span, of_slot in self._each(_flat(y)):
            by_number[span.slot].add_(of_slot.sum(0))
        return sums

    def _each(self, rows: Tensor) -> Iterator[tuple[Span, Tensor]]:
        for span in self.spans:
            yield span, rows[span.start : span.stop]

    def _products(self, rows: Tensor, sides: Sequence[Tensor], width: int) -> Tensor:
        # each a tensor of its own: where it begins in memory decides how some products round
        found = [torch.mm(of_slot, sides[span.slot]) for span, of_slot in self._each(rows)]
        n_behind = self.n_rows - (self.spans[-1].stop if self.spans else 0)
        if n_behind:
            found.append(rows.new_zeros(n_behind, width))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _add_products_(self, total: Tensor, h: Tensor, sides: Sequence[Tensor]) -> None:
        rows = total.view(-1, total.shape[-1])
        for span, of_slot in self._each(rows):
            of_slot.addmm_(h[span.start : span.stop], sides[span.slot])

    def _gradient(self, left: Tensor, right: Tensor, side: Tensor) -> Tensor:
        found = torch.zeros_like(side)
        by_number, seen = _by_number(found), set()
        for span, of_slot in self._each(left):
            beside = right[span.start : span.stop]
            if span.slot in seen:
                by_number[span.slot].addmm_(of_slot.mT, beside)
            else:
                torch.mm(of_slot.mT, beside, out=by_number[span.slot])
            seen.add(span.slot)
        return found


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _by_number(side: Tensor, *, dims: int = 2) -> tuple[Tensor, ...]:
    """A side of each slot; without U there is one."""
    return side.unbind(0) if side.dim() > dims else (side,)


@dataclass(frozen=True)
class Masked(Spans):
    """All slots side by side; hidden columns of other slots than a row's own are zero."""

    mask_MU1: Tensor
    """1 where a slot is the row's own."""

    @override
    def down(self, x: Tensor, a_UIX: Tensor) -> Tensor:
        return self._keep_own(x, a_UIX.transpose(0, 1).flatten(1), a_UIX.shape[-1])

    @override
    def columns(self, h: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        """(M, U * X) as (M, U * R) for each sibling."""
        if len(ranks) == 1:
            return [h]
        h_MUX = h.unflatten(1, (self.mask_MU1.shape[1], -1))
        return [part.flatten(1) for part in h_MUX.split(list(ranks), -1)]

    @override
    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        n_slots = self.mask_MU1.shape[1]
        return torch.cat([part.unflatten(1, (n_slots, -1)) for part in parts], -1).flatten(1)

    @override
    def narrowed(self, h: Tensor) -> Tensor:
        return h.unflatten(1, (self.mask_MU1.shape[1], -1)).sum(1)

    @override
    def widened(self, h_MX: Tensor, a_UIX: Tensor) -> Tensor:
        return (h_MX[:, None] * self.mask_MU1).flatten(1)

    @override
    def add_up_(self, total: Tensor, h: Tensor, b_URO: Tensor) -> None:
        total.view(-1, total.shape[-1]).addmm_(h, b_URO.flatten(0, 1))

    @override
    def pull(self, g: Tensor, b_URO: Tensor) -> Tensor:
        return self._keep_own(g, b_URO.flatten(0, 1).mT, b_URO.shape[-2])

    @override
    def add_down_(self, total: Tensor, dh: Tensor, a_UIX: Tensor) -> None:
        total.view(-1, total.shape[-1]).addmm_(dh, a_UIX.transpose(0, 1).flatten(1).mT)

    @override
    def grad_a(self, x: Tensor, dh: Tensor, a_UIX: Tensor) -> Tensor:
        wide_IY = torch.mm(x.mT, dh)
        return wide_IY.unflatten(1, (a_UIX.shape[0], -1)).transpose(0, 1).contiguous()

    @override
    def grad_b(self, h: Tensor, g: Tensor, b_URO: Tensor) -> Tensor:
        return torch.mm(h.mT, g).view(b_URO.shape)

    def _keep_own(self, rows: Tensor, wide: Tensor, width: int) -> Tensor:
        found = torch.mm(rows, wide)
        found.view(-1, self.mask_MU1.shape[1], width).mul_(self.mask_MU1)
        return found
