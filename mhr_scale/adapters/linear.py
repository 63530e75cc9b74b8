"""The adapted linear: y = W x + (alpha / r) (x A[slot]) B[slot], alone or with its siblings.

Shape letters: B batch rows, L tokens, I in features, O out features, R rank, U slots, X = n * R
hidden columns of n siblings. With one slot the leading U is left out.

Siblings are linears that read the same input (q, k and v; gate and up), of whatever widths. Called
together they project x down once and sum its gradient in place. Rows point at slots through a
`RowMap` made once per step on the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mhr_scale.adapters import opaque, products
from mhr_scale.adapters.by_token import TokenSlots
from mhr_scale.adapters.products import Cut
from mhr_scale.adapters.row_map import RowMap
from mhr_scale.errors import AdapterError

if opaque.ARE_KNOWN:
    from mhr_scale.adapters import in_graph


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankSlots:
    """Slots of a linear or of siblings: a_UIX for all of them, and a b_URO (scaled) for each.

    A sibling that is not adapted has None, and no columns in A.
    """

    a_UIX: Tensor
    b_URO: tuple[Tensor | None, ...]
    rows: RowMap
    cut: Cut

    def apply(self, x: Tensor, bases: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Return W x + (x A[slot]) B[slot] of every base, for x (B * k, ..., I)."""
        ways, how = _ways(self.rows, x, n_columns=self.a_UIX.shape[-1])
        frozen: list[Any] = [(base.weight, base.bias) for base in bases]
        is_plain = all(type(base) is nn.Linear for base in bases)
        if is_plain and not any(p is not None and p.requires_grad for pair in frozen for p in pair):
            return ways.products(x, self.a_UIX, self.b_URO, frozen, **how, cut=self.cut)
        ys = [base(x) for base in bases]
        return ways.update(x, self.a_UIX, self.b_URO, ys, **how, cut=self.cut)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingSlots:
    """(IA)3 slots of a linear or of siblings: vectors l_UO that scale the outputs."""

    l_UO: tuple[Tensor | None, ...]
    rows: RowMap
    cut: Cut

    def apply(self, x: Tensor, bases: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Return (W x) * l[slot] of every base, for x (B * k, ..., I)."""
        ways, how = _ways(self.rows, x)
        return tuple(
            base(x) if l_UO is None else ways.scale(base(x), l_UO, **how, cut=self.cut)
            for base, l_UO in zip(bases, self.l_UO, strict=True)
        )


def _ways(rows: RowMap, x: Tensor, *, n_columns: int = 0) -> tuple[Any, dict[str, Any]]:
    """Where products are, and how rows find their slots there."""
    if torch.compiler.is_compiling():
        return in_graph, {"rows": rows}
    return products, {"by": rows.by_slot(x, n_columns=n_columns)}


#: What a linear, or siblings, hold in a step.
AnySlots: TypeAlias = LowRankSlots | ScalingSlots | TokenSlots


class _Adapted(nn.Module):
    """Base of `AdaptedLinear` and `Siblings`: a module that holds the slots of one step.

    `slots` is set inside `with Adapter.slots(...)`, also while activations are recomputed; outside
    of that block a forward pass is an error, unless the adapter is off.
    """

    slots: AnySlots | None

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.slots = None

    def _run(self, x: Tensor, bases: Sequence[nn.Module], *, is_off: bool) -> tuple[Tensor, ...]:
        if is_off:
            return tuple(base(x) for base in bases)
        slots = self.slots
        if slots is None:
            raise AdapterError(
                f"{self.name} has no slots: call the model inside `with adapter.slots(task_ids)`, "
                "or inside `with adapter.off()` for the bare backbone"
            )
        if not torch.compiler.is_compiling() and not slots.rows.fits(x):
            raise AdapterError(f"{self.name} got {slots.rows.describe_misfit(x)}")
        return slots.apply(x, bases)

    def extra_repr(self) -> str:
        """Name of the linear in its backbone."""
        return self.name


class AdaptedLinear(_Adapted):
    """A frozen linear and the slots of the current step."""

    def __init__(self, base: nn.Module, name: str, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name)
        self.base = base
        self._dtype = dtype
        self._siblings: tuple[Siblings, ...] = ()
        self.is_off = False
        self.is_attached = True

    @property
    def siblings(self) -> "Siblings | None":
        """The siblings this linear is called with, if any."""
        return self._siblings[0] if self._siblings else None

    @property
    def weight(self) -> Tensor:
        """The frozen weight: T5's feed-forward reads `wo.weight.dtype`."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type of the frozen product: the weight's, or `dtype` where the weight is integers.

        Weights in 8 bits are, and those in 4 bits unless a float dtype holds their bytes.
        """
        dtype = self.weight.dtype
        return dtype if dtype.is_floating_point else self._dtype

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, if the linear has one."""
        return self.base.bias  # type: ignore[return-value]

    def leave(self) -> None:
        """Mark the linear as removed from its model."""
        self._siblings = ()
        self.is_attached = False

    def forward(self, x: Tensor) -> Tensor:
        """Frozen product plus the adapter of each row's slot."""
        return self._run(x, (self.base,), is_off=self.is_off)[0]


class Siblings(_Adapted):
    """Linears of one module that read the same input, at least one of them adapted.

    That module calls them together (`families.siblings`). They remain its children and are
    registered here a second time, so that sharding gathers them as one unit.
    """

    def __init__(self, members: Sequence[nn.Module], name: str) -> None:
        super().__init__(name)
        self.members = nn.ModuleList(members)
        for member in self.adapted():
            member._siblings = (self,)

    def adapted(self) -> Iterator[AdaptedLinear]:
        """The members that are adapted linears."""
        return (m for m in self.members if isinstance(m, AdaptedLinear))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of each member for x."""
        bases = [base_of(member) for member in self.members]
        return self._run(x, bases, is_off=all(member.is_off for member in self.adapted()))


def base_of(linear: nn.Module) -> Any:
    """The frozen linear inside an adapted one; any other linear as it is."""
    return linear.base if isinstance(linear, AdaptedLinear) else linear


#: Modules that use weights of modules below them without calling those: they are had as one.
UNITS = (AdaptedLinear, Siblings)
