"""Frozen and low-rank products in one pass: outputs and input gradients are summed in place.

Beside them the scaling of (IA)3.

Shape letters: U slots, I in features, O out features, R rank, X hidden columns of all siblings.
How rows find their slots is `by_slot`'s.
Plain autograd would materialise W x, the low-rank part and their sum, and the same three in the
backward pass; here y and the gradient of x are one tensor each, which the products accumulate into.
Saved for backward: x, the hidden h = x A, and the slots' pairs. The frozen weights are referenced,
not saved, because sharding frees their data between the passes. Second derivatives are refused:
they would lack the terms through h.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mhr_scale.adapters.by_slot import EVEN, BySlot
from mhr_scale.adapters.opaque import Opaque
from mhr_scale.errors import AdapterError

#: Weight (O, I) and bias (O,) of a frozen linear.
Frozen: TypeAlias = tuple[Tensor, Tensor | None]


@dataclass(eq=False)
class Cut(Opaque):
    """Where gradients leave the model's graph for that of the mixing: the slots' tensors.

    It is open while somebody waits for them. A backward pass that meets it shut would end in
    tensors that nobody reads.
    """

    is_open: bool = False

    def check(self) -> None:
        """Raise `AdapterError` if the gradients of the slots would be lost."""
        if not self.is_open:
            raise AdapterError(
                "loss.backward() does not reach the adapter: call slots.backward(loss) inside "
                "`with adapter.slots(task_ids) as slots`; for gradients of the model's inputs "
                "alone, adapter.requires_grad_(False) first"
            )


def products(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor | None],
    frozen: Sequence[Frozen],
    *,
    by: BySlot = EVEN,
    cut: Cut,
) -> tuple[Tensor, ...]:
    """W x + (x A[slot]) B[slot] of linears that share x, and their bias where they have one.

    The frozen weights (O, I) and biases (O,) get no gradient. `by` tells which slots the rows of
    x (..., I) read. Without U in A and B there is one.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, a_UIX, b_URO, frozen = as_autocast(x, a_UIX, b_URO, frozen)
        with torch.autocast(x.device.type, enabled=False):
            return _Products.apply(x, a_UIX, tuple(frozen), by, cut, *b_URO)
    return _Products.apply(x, a_UIX, tuple(frozen), by, cut, *b_URO)


def as_autocast(
    x: Tensor, a_UIX: Tensor, b_URO: Sequence[Tensor | None], frozen: Sequence[Frozen]
) -> tuple[Tensor, Tensor, Sequence[Tensor | None], Sequence[Frozen]]:
    """Arguments of `products` in the data type of autocast, which is on."""
    dtype = torch.get_autocast_dtype(x.device.type)
    pairs = [None if b is None else b.to(dtype) for b in b_URO]
    frozen = [(w.to(dtype), None if b is None else b.to(dtype)) for w, b in frozen]
    return x.to(dtype), a_UIX.to(dtype), pairs, frozen


def update(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    *,
    by: BySlot = EVEN,
    cut: Cut,
) -> tuple[Tensor, ...]:
    """Add (x A[slot]) B[slot] to each y in place: for frozen linears other than plain `nn.Linear`.

    A y that is a view (the output of a linear with a bias) is copied: where a function modifies a
    view in place, autograd takes the gradient of its first input, here x, as that of the view. So
    is a y whose rows do not lie one behind the other, which no product can be added to.
    """
    ys = [
        y.clone(memory_format=torch.contiguous_format)
        if y._is_view() or not y.is_contiguous()
        else y
        for y in ys
    ]
    with torch.autocast(x.device.type, enabled=False):
        return _Update.apply(x.to(a_UIX.dtype), a_UIX, len(ys), by, cut, *ys, *b_URO)


def scale(y: Tensor, l_UO: Tensor, *, by: BySlot = EVEN, cut: Cut) -> Tensor:
    """y * l[slot] in the data type of y, rounded once from the product with l as it is.

    A bfloat16 l would know two numbers between 1 and 1.01.
    """
    scaled: Tensor = _Scale.apply(y, l_UO, by, cut)
    return scaled


def _ranks(pairs: Sequence[Tensor | None]) -> list[int]:
    """Hidden columns of those siblings that are adapted."""
    return [b.shape[-2] for b in pairs if b is not None]


def add_updates_(
    ys: Sequence[Tensor], x: Tensor, a_UIX: Tensor, pairs: Sequence[Tensor | None], by: BySlot
) -> Tensor:
    """Add the low-rank products of rows x to `ys` in place; returns their hidden columns."""
    h = by.down(x, a_UIX)
    parts = iter(by.columns(h, _ranks(pairs)))
    for y, b in zip(ys, pairs, strict=True):
        if b is not None:
            by.add_up_(y, next(parts), b)
    return h


def update_gradients(
    gradients: Sequence[Tensor | None],
    x: Tensor,
    h: Tensor,
    a_UIX: Tensor,
    pairs: Sequence[Tensor | None],
    by: BySlot,
    *,
    dx: Tensor | None,
    needs: tuple[bool, Sequence[bool]],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of A and the Bs, of rows x and their hidden columns; that of x is added to `dx`.

    `needs` tells for A, and for each B, whether theirs is wanted.
    """
    needs_a, needs_b = needs
    dhs: list[Tensor] = []
    dbs: list[Tensor | None] = []
    parts = iter(by.columns(h, _ranks(pairs)))
    for g, b, needs_own in zip(gradients, pairs, needs_b, strict=True):
        db = None
        if b is not None:
            part = next(parts)
            if g is None:
                dhs.append(torch.zeros_like(part))
            else:
                g_rows = by.rows(g, b)
                dhs.append(by.pull(g_rows, b))
                if needs_own:
                    db = by.grad_b(part, g_rows, b)
        dbs.append(db)
    dh = by.joined(dhs)
    if dx is not None:
        by.add_down_(dx, dh, a_UIX)
    return by.grad_a(x, dh, a_UIX) if needs_a else None, dbs


def frozen_gradient(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], shape: Sequence[int]
) -> Tensor | None:
    """The gradient of x (`shape`) through the frozen products; None if no output has one."""
    dx = None
    for g, weight in zip(gradients, weights, strict=True):
        if g is not None:
            g_rows = g.reshape(-1, g.shape[-1])
            if dx is None:
                dx = torch.mm(g_rows, weight)
            else:
                dx.addmm_(g_rows, weight)
    return None if dx is None else dx.view(shape)


def _keep(
    ctx: Any, x: Tensor, a_UIX: Tensor, pairs: Sequence[Tensor | None], ys: list[Tensor]
) -> None:
    """Add the low-rank products to `ys` in place, and save what backward needs."""
    rows = ctx.by.rows(x, a_UIX)
    h = add_updates_(ys, rows, a_UIX, pairs, ctx.by)
    ctx.shape, ctx.has_pair = x.shape, tuple(b is not None for b in pairs)
    ctx.save_for_backward(rows, h, a_UIX, *(b for b in pairs if b is not None))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, gradients: Sequence[Tensor | None], dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x (added to `dx`, if given), A and the Bs."""
    x, h, a_UIX, *rest = ctx.saved_tensors
    saved_bs = iter(rest)
    pairs = [next(saved_bs) if has else None for has in ctx.has_pair]
    needs_x, needs_a, *_ = ctx.needs_input_grad
    needs_b = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(pairs) :]
    if needs_a or any(needs_b):
        ctx.cut.check()
    if needs_x and dx is None:
        dx = x.new_zeros(ctx.shape)
    needs = needs_a, needs_b
    return dx, *update_gradients(gradients, x, h, a_UIX, pairs, ctx.by, dx=dx, needs=needs)


class _Products(torch.autograd.Function):
    """Frozen products and their low-rank updates."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a_UIX: Tensor,
        frozen: tuple[Frozen, ...],
        by: BySlot,
        cut: Cut,
        *pairs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ys = [F.linear(x, weight, bias) for weight, bias in frozen]
        ctx.frozen, ctx.by, ctx.cut = frozen, by, cut
        _keep(ctx, x, a_UIX, pairs, ys)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            dx = frozen_gradient(gradients, [weight for weight, _ in ctx.frozen], ctx.shape)
        dx, da, dbs = _backward(ctx, gradients, dx)
        return dx, da, None, None, None, *dbs


class _Update(torch.autograd.Function):
    """Low-rank updates, added in place to products that were made elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_UIX: Tensor, n: int, by: BySlot, cut: Cut, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, pairs = [y for y in tensors[:n] if y is not None], tensors[n:]
        ctx.mark_dirty(*ys)
        ctx.by, ctx.cut = by, cut
        _keep(ctx, x, a_UIX, pairs, ys)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dx, da, dbs = _backward(ctx, gradients, None)
        return dx, da, None, None, None, *gradients, *dbs


class _Scale(torch.autograd.Function):
    """(IA)3: outputs times the vectors of the slots."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, l_UO: Tensor, by: BySlot, cut: Cut) -> Tensor:
        ctx.save_for_backward(y, l_UO)
        ctx.by, ctx.cut = by, cut
        return by.times(y, l_UO).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, l_UO = ctx.saved_tensors
        dy = dl = None
        if ctx.needs_input_grad[0]:
            dy = ctx.by.times(g, l_UO).to(y.dtype)
        if ctx.needs_input_grad[1]:
            ctx.cut.check()
            dl = ctx.by.sums(g.to(l_UO.dtype) * y, l_UO)
        return dy, dl, None, None
