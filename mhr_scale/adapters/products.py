"""Frozen and low-rank products in one pass: outputs and input gradients are summed in place.

Beside them the scaling of (IA)3.

Shape letters: U slots, I in features, O out features, R rank, X hidden columns of all siblings.
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

from mhr_scale.errors import AdapterError

#: Weight (O, I) and bias (O,) of a frozen linear.
Frozen: TypeAlias = tuple[Tensor, Tensor | None]


@dataclass
class Cut:
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
    cut: Cut,
) -> tuple[Tensor, ...]:
    """W x + (x A[slot]) B[slot] of linears that share x, and their bias where they have one.

    The frozen weights (O, I) and biases (O,) get no gradient.

    x (..., I) holds equally many consecutive rows for each slot. Without U in A and B there is one.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, a_UIX = x.to(dtype), a_UIX.to(dtype)
        frozen = [(w.to(dtype), None if b is None else b.to(dtype)) for w, b in frozen]
        with torch.autocast(device, enabled=False):
            pairs = [None if b is None else b.to(dtype) for b in b_URO]
            return _Products.apply(x, a_UIX, tuple(frozen), cut, *pairs)
    return _Products.apply(x, a_UIX, tuple(frozen), cut, *b_URO)


def update(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    *,
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
        return _Update.apply(x.to(a_UIX.dtype), a_UIX, len(ys), cut, *ys, *b_URO)


def scale(y: Tensor, l_UO: Tensor, *, cut: Cut) -> Tensor:
    """y * l[slot] in the data type of y, rounded once from the product with l as it is.

    y (..., O) holds equally many consecutive rows for each slot. A bfloat16 l would know two
    numbers between 1 and 1.01.
    """
    scaled: Tensor = _Scale.apply(y, l_UO, cut)
    return scaled


def _by_slot(tensor: Tensor, side: Tensor) -> Tensor:
    """Rows of each slot: (U, rows, width), or (rows, width) if `side` is of a single slot."""
    return tensor.reshape(_rows_shape(tensor, side))


def _rows_shape(tensor: Tensor, side: Tensor) -> tuple[int, ...]:
    return (*side.shape[:-2], -1, tensor.shape[-1])


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, a_UIX: Tensor) -> None:
    """Add a product of slots' rows to `total`, whose rows have to be a view of it."""
    rows = total.view(_rows_shape(total, a_UIX))
    if left.dim() == 2:
        rows.addmm_(left, right)
    else:
        rows.baddbmm_(left, right)


def _columns(h: Tensor, pairs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each sibling's columns of h, None where it has no pair."""
    if len(pairs) == 1:
        return [h]
    ranks = [b.shape[-2] for b in pairs if b is not None]
    parts = iter(h.split(ranks, -1))
    return [None if b is None else next(parts) for b in pairs]


def _forward(
    ctx: Any, x: Tensor, a_UIX: Tensor, pairs: Sequence[Tensor | None], ys: list[Tensor]
) -> None:
    """Add the low-rank products to `ys` in place, and save what backward needs."""
    rows = _by_slot(x, a_UIX)
    h = _multiply(rows, a_UIX)
    for y, part, b in zip(ys, _columns(h, pairs), pairs, strict=True):
        if b is not None and part is not None:
            _add_product_(y, part, b, a_UIX)
    ctx.shape = x.shape
    ctx.has_pair = tuple(b is not None for b in pairs)
    ctx.save_for_backward(rows, h, a_UIX, *(b for b in pairs if b is not None))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, gradients: Sequence[Tensor | None], dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x (added to `dx`, if given), A and the Bs."""
    x, h, a_UIX, *rest = ctx.saved_tensors
    saved_bs = iter(rest)
    pairs = [next(saved_bs) if has else None for has in ctx.has_pair]
    dhs: list[Tensor] = []
    dbs: list[Tensor | None] = []
    first_b = len(ctx.needs_input_grad) - len(pairs)
    if ctx.needs_input_grad[1] or any(ctx.needs_input_grad[first_b:]):
        ctx.cut.check()
    for i, (g, part, b) in enumerate(zip(gradients, _columns(h, pairs), pairs, strict=True)):
        db = None
        if b is not None and part is not None:
            if g is None:
                dhs.append(torch.zeros_like(part))
            else:
                g_rows = _by_slot(g, a_UIX)
                dhs.append(_multiply(g_rows, b.mT))
                if ctx.needs_input_grad[first_b + i]:
                    db = _multiply(part.mT, g_rows)
        dbs.append(db)
    dh = dhs[0] if len(dhs) == 1 else torch.cat(dhs, -1)
    if ctx.needs_input_grad[0]:
        if dx is None:
            dx = _multiply(dh, a_UIX.mT).view(ctx.shape)
        else:
            _add_product_(dx, dh, a_UIX.mT, a_UIX)
    da = _multiply(x.mT, dh) if ctx.needs_input_grad[1] else None
    return dx, da, dbs


class _Products(torch.autograd.Function):
    """Frozen products and their low-rank updates."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a_UIX: Tensor,
        frozen: tuple[Frozen, ...],
        cut: Cut,
        *pairs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ys = [F.linear(x, weight, bias) for weight, bias in frozen]
        _forward(ctx, x, a_UIX, pairs, ys)
        ctx.frozen, ctx.cut = frozen, cut
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            for g, (weight, _) in zip(gradients, ctx.frozen, strict=True):
                if g is not None:
                    g_rows = g.reshape(-1, g.shape[-1])
                    if dx is None:
                        dx = torch.mm(g_rows, weight)
                    else:
                        dx.addmm_(g_rows, weight)
            if dx is not None:
                dx = dx.view(ctx.shape)
        dx, da, dbs = _backward(ctx, gradients, dx)
        return dx, da, None, None, *dbs


class _Update(torch.autograd.Function):
    """Low-rank updates, added in place to products that were made elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_UIX: Tensor, n: int, cut: Cut, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, pairs = [y for y in tensors[:n] if y is not None], tensors[n:]
        ctx.mark_dirty(*ys)
        _forward(ctx, x, a_UIX, pairs, ys)
        ctx.cut = cut
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dx, da, dbs = _backward(ctx, gradients, None)
        return dx, da, None, None, *gradients, *dbs


class _Scale(torch.autograd.Function):
    """(IA)3: outputs times the vectors of the slots."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, l_UO: Tensor, cut: Cut) -> Tensor:
        ctx.save_for_backward(y, l_UO)
        ctx.cut = cut
        return _times(y, l_UO).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, l_UO = ctx.saved_tensors
        dy = dl = None
        if ctx.needs_input_grad[0]:
            dy = _times(g, l_UO).to(y.dtype)
        if ctx.needs_input_grad[1]:
            ctx.cut.check()
            gy = g.to(l_UO.dtype) * y
            dims = tuple(range(gy.dim() - 1))
            if l_UO.dim() == 2:
                gy, dims = gy.reshape(l_UO.shape[0], -1, l_UO.shape[1]), (1,)
            dl = gy.sum(dims)
        return dy, dl, None


def _times(y: Tensor, l_UO: Tensor) -> Tensor:
    """y * l[slot], in the wider of both data types; no view, as modules may add to it in place."""
    if l_UO.dim() == 1:
        return y * l_UO
    scaled = y.reshape(l_UO.shape[0], -1, y.shape[-1]) * l_UO[:, None]
    whole: Tensor = torch.ops.aten._unsafe_view(scaled, y.shape)
    return whole
