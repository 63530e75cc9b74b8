"""The adapted linear: y = W x + (alpha / r) (x A[slot]) B[slot].

Shape letters: B batch rows, L tokens, I in features, O out features, R rank, U slots.

Rows point at slots through a `RowMap` made once per step on the host. No path copies A or B per
row, and none asks the device anything: which path is taken is known from the map alone.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from mhr_scale.errors import AdapterError

#: Largest U * R of the masked path: wider, and its masked-out products cost more than launches.
MASK_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class RowMap:
    """Which slot each batch row uses. `slot_of_row` has one entry per example.

    A tensor whose first dimension is k times longer holds k consecutive rows per example (beams,
    answer choices), as `repeat_interleave` makes them.
    """

    slot_of_row: tuple[int, ...]
    n_slots: int

    @cached_property
    def is_even(self) -> bool:
        """Whether the rows are sorted by slot, with equally many rows each."""
        count, rest = divmod(len(self.slot_of_row), self.n_slots)
        return rest == 0 and self.slot_of_row == tuple(
            slot for slot in range(self.n_slots) for _ in range(count)
        )

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Maximal runs of equal slots as (slot, number of rows)."""
        return tuple((slot, len(list(rows))) for slot, rows in groupby(self.slot_of_row))

    def mask(self, like: Tensor) -> Tensor:
        """One-hot (B, 1, U, 1) on the device and in the dtype of `like`."""
        index = torch.tensor(self.slot_of_row, device=like.device)
        one_hot = nn.functional.one_hot(index, self.n_slots)
        return one_hot.to(like.dtype)[:, None, :, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankSlots:
    """One linear's slots: a_UIR, b_URO (the scale folded into B), and the rows that use them."""

    a_UIR: Tensor
    b_URO: Tensor
    rows: RowMap
    mask_B1U1: Tensor | None

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + (x A[slot]) B[slot] for x (B * k, ..., I), y (B * k, ..., O)."""
        a_UIR, b_URO, rows = self.a_UIR, self.b_URO, self.rows
        n_slots, width, rank = a_UIR.shape
        if n_slots == 1:
            return y + (x @ a_UIR[0]) @ b_URO[0]
        n_rows = len(rows.slot_of_row)
        if rows.is_even:
            x_UNI = x.reshape(n_slots, -1, width)
            return y + torch.bmm(torch.bmm(x_UNI, a_UIR), b_URO).reshape(y.shape)
        x_BNI = x.reshape(n_rows, -1, width)
        if self.mask_B1U1 is not None:
            h_BNX = x_BNI @ a_UIR.transpose(0, 1).reshape(width, n_slots * rank)
            h_BNUR = h_BNX.unflatten(-1, (n_slots, rank)) * self.mask_B1U1
            delta = h_BNUR.flatten(-2) @ b_URO.reshape(n_slots * rank, -1)
        else:
            counts = [count for _, count in rows.runs]
            parts = [
                (x_rNI @ a_UIR[slot]) @ b_URO[slot]
                for (slot, _), x_rNI in zip(rows.runs, x_BNI.split(counts), strict=True)
            ]
            delta = torch.cat(parts)
        return y + delta.reshape(y.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingSlots:
    """One linear's (IA)3 slots: vectors l_UO that scale its output."""

    l_UO: Tensor
    rows: RowMap
    index_B: Tensor | None

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y * l[slot]."""
        l_UO, rows = self.l_UO, self.rows
        if rows.n_slots == 1:
            return y * l_UO[0]
        l_BO = l_UO if rows.is_even else l_UO[self.index_B]
        y_BNO = y.reshape(l_BO.shape[0], -1, y.shape[-1])
        return (y_BNO * l_BO[:, None]).reshape(y.shape)


class AdaptedLinear(nn.Module):
    """A frozen linear and the slots of the current step.

    `slots` is set for the length of a step by `Adapter.slots` and stays the same while activations
    are recomputed; outside of it a forward pass is an error, unless the adapter is off.
    """

    slots: LowRankSlots | ScalingSlots | None

    def __init__(self, base: nn.Module, name: str, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._dtype = dtype
        self.slots = None
        self.is_off = False
        self.is_attached = True

    @property
    def weight(self) -> Tensor:
        """The frozen weight: T5's feed-forward reads `wo.weight.dtype`."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type of the frozen product: the weight's, or `dtype` where that is a whole number.

        Which is what weights in 8 bits are, and in 4 bits unless they pass for something else.
        """
        dtype = self.weight.dtype
        return dtype if dtype.is_floating_point else self._dtype

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, if the linear has one."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Frozen product plus the adapter of each row's slot."""
        y: Tensor = self.base(x)
        if self.is_off:
            return y
        slots = self.slots
        if slots is None:
            raise AdapterError(
                f"{self.name} has no slots: call the model inside `with adapter.slots(task_ids)`, "
                "or inside `with adapter.off()` for the bare backbone"
            )
        if x.shape[0] % len(slots.rows.slot_of_row) and slots.rows.n_slots > 1:
            raise AdapterError(
                f"{self.name} got {x.shape[0]} rows under slots made for "
                f"{len(slots.rows.slot_of_row)} examples; give one task id per example"
            )
        return slots.apply(x, y)

    def extra_repr(self) -> str:
        """Name of the linear in its backbone."""
        return self.name
