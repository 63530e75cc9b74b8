"""`products` as operations of a compiled graph: `torch.compile` does not look into them.

Which slots rows read is known on the host and is another in every step. Traced, it would be part of
the graph, which would be compiled anew in every step. So a graph has one operation for the linears
that share an input, with the step's tensors and its `RowMap` for arguments; inside run the products
that run without compilation, with the same bits. Around them everything is the compiler's.

Shape letters as in `products`, M rows.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.adapters import opaque
from mhr_scale.adapters.by_slot import BySlot
from mhr_scale.adapters.products import (
    Cut,
    Frozen,
    add_updates_,
    as_autocast,
    frozen_gradient,
    update_gradients,
)
from mhr_scale.adapters.row_map import RowMap
from mhr_scale.errors import AdapterError

for kind in (RowMap, Cut):
    opaque.register(kind)


def products(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor | None],
    frozen: Sequence[Frozen],
    *,
    rows: RowMap,
    cut: Cut,
) -> tuple[Tensor, ...]:
    """`products.products` in a graph, of rows that find their slots there."""
    if torch.is_autocast_enabled(x.device.type):
        x, a_UIX, b_URO, frozen = as_autocast(x, a_UIX, b_URO, frozen)
    weights = [weight for weight, _ in frozen]
    biases, has_bias = _present([bias for _, bias in frozen])
    pairs, has_pair = _present(b_URO)
    *ys, _ = torch.ops.mhr_scale.products(
        x, a_UIX, pairs, has_pair, weights, biases, has_bias, rows, cut
    )
    return tuple(ys)


def update(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    *,
    rows: RowMap,
    cut: Cut,
) -> tuple[Tensor, ...]:
    """`products.update` in a graph; each y is copied."""
    pairs, has_pair = _present(b_URO)
    *found, _ = torch.ops.mhr_scale.update(
        x.to(a_UIX.dtype), a_UIX, pairs, has_pair, list(ys), rows, cut
    )
    return tuple(found)


def scale(y: Tensor, l_UO: Tensor, *, rows: RowMap, cut: Cut) -> Tensor:
    """`products.scale` in a graph."""
    scaled: Tensor = torch.ops.mhr_scale.scale(y, l_UO, rows, cut)
    return scaled


def _way(rows: RowMap, x: Tensor, *, n_columns: int = 0) -> BySlot:
    """How the rows of x find their slots; raises `AdapterError` if they are others."""
    if not rows.fits(x):
        raise AdapterError(f"an adapted linear got {rows.describe_misfit(x)}")
    return rows.by_slot(x, n_columns=n_columns)


def _present(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """Those that are there, and which are: torch takes no gradients of lists with gaps."""
    return [t for t in tensors if t is not None], [t is not None for t in tensors]


def _all(present: Sequence[Tensor], are: Sequence[bool]) -> list[Tensor | None]:
    """The reverse of `_present`."""
    left = iter(present)
    return [next(left) if is_present else None for is_present in are]


# -- products --------------------------------------------------------------------------------------


@torch.library.custom_op("mhr_scale::products", mutates_args=())
def _products(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor],
    has_pair: Sequence[bool],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    rows: RowMap,
    cut: Cut,
) -> list[Tensor]:
    """Outputs, and hidden columns for backward."""
    ys = _frozen(x, weights, biases, has_bias)
    return [*ys, _add_updates_(ys, x, a_UIX, b_URO, has_pair, rows)]


@_products.register_fake
def _(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor],
    has_pair: Sequence[bool],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    rows: RowMap,
    cut: Cut,
) -> list[Tensor]:
    return [*_frozen(x, weights, biases, has_bias), _hidden(x, a_UIX)]


def _frozen(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool]
) -> list[Tensor]:
    both = zip(weights, _all(biases, has_bias), strict=True)
    return [F.linear(x, weight, bias) for weight, bias in both]


def _add_updates_(
    ys: Sequence[Tensor],
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor],
    has_pair: Sequence[bool],
    rows: RowMap,
) -> Tensor:
    by = _way(rows, x, n_columns=a_UIX.shape[-1])
    return by.narrowed(add_updates_(ys, by.rows(x, a_UIX), a_UIX, _all(b_URO, has_pair), by))


def _hidden(x: Tensor, a_UIX: Tensor) -> Tensor:
    """A tensor of the shape of the hidden columns that are kept (M, X)."""
    return x.new_empty(math.prod(x.shape[:-1]), a_UIX.shape[-1])


@torch.library.custom_op("mhr_scale::products_backward", mutates_args=())
def _products_backward(
    gradients: Sequence[Tensor],
    x: Tensor,
    h_MX: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor],
    has_pair: Sequence[bool],
    weights: Sequence[Tensor],
    rows: RowMap,
    cut: Cut,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, A and the Bs; one without numbers where `needs` says that none is needed.

    `weights` are those of the frozen products; none: they are not of this operation.
    """
    needs_x, needs_a, *needs_b = needs
    if needs_a or any(needs_b):
        cut.check()
    dx = None
    if needs_x:
        dx = frozen_gradient(gradients, weights, x.shape) if weights else x.new_zeros(x.shape)
    by = _way(rows, x, n_columns=a_UIX.shape[-1])
    is_needed = iter(needs_b)
    da, dbs = update_gradients(
        gradients,
        by.rows(x, a_UIX),
        by.widened(h_MX, a_UIX),
        a_UIX,
        _all(b_URO, has_pair),
        by,
        dx=dx,
        needs=(needs_a, [has and next(is_needed) for has in has_pair]),
    )
    sides = [db for db, has in zip(dbs, has_pair, strict=True) if has]
    return [x.new_empty(0) if found is None else found for found in (dx, da, *sides)]


@_products_backward.register_fake
def _(
    gradients: Sequence[Tensor],
    x: Tensor,
    h_MX: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor],
    has_pair: Sequence[bool],
    weights: Sequence[Tensor],
    rows: RowMap,
    cut: Cut,
    needs: Sequence[bool],
) -> list[Tensor]:
    sides = zip((x, a_UIX, *b_URO), needs, strict=True)
    return [side.new_empty(side.shape if is_needed else 0) for side, is_needed in sides]


def _keep_products(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, a_UIX, b_URO, ctx.has_pair, weights, biases, _, ctx.rows, ctx.cut = inputs
    ctx.n_biases = len(biases)
    _keep(ctx, x, output[-1], a_UIX, b_URO, weights)


def _products_gradients(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    dx, da, *dbs = _gradients(ctx, gradients)
    of_weights, of_biases = ([None] * n for n in (len(ctx.has_pair), ctx.n_biases))
    return dx, da, dbs, None, of_weights, of_biases, None, None, None


def _keep(
    ctx: Any,
    x: Tensor,
    h_MX: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> None:
    ctx.n_pairs = len(b_URO)
    ctx.save_for_backward(x, h_MX, a_UIX, *b_URO, *weights)


def _gradients(ctx: Any, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """Those of x, A and the Bs; the last of `gradients` is of the hidden columns, which is none."""
    x, h_MX, a_UIX, *rest = ctx.saved_tensors
    needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
    needs = [needs_x, needs_a, *needs_b]
    found = torch.ops.mhr_scale.products_backward(
        list(gradients[:-1]),
        x,
        h_MX,
        a_UIX,
        rest[: ctx.n_pairs],
        ctx.has_pair,
        rest[ctx.n_pairs :],
        ctx.rows,
        ctx.cut,
        needs,
    )
    return [one if is_needed else None for one, is_needed in zip(found, needs, strict=True)]


_products.register_autograd(_products_gradients, setup_context=_keep_products)


# -- updates of products made elsewhere ------------------------------------------------------------


@torch.library.custom_op("mhr_scale::update", mutates_args=())
def _update(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor],
    has_pair: Sequence[bool],
    ys: Sequence[Tensor],
    rows: RowMap,
    cut: Cut,
) -> list[Tensor]:
    """Updated copies, and hidden columns for backward."""
    found = [y.clone(memory_format=torch.contiguous_format) for y in ys]
    return [*found, _add_updates_(found, x, a_UIX, b_URO, has_pair, rows)]


@_update.register_fake
def _(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor],
    has_pair: Sequence[bool],
    ys: Sequence[Tensor],
    rows: RowMap,
    cut: Cut,
) -> list[Tensor]:
    return [*(y.new_empty(y.shape) for y in ys), _hidden(x, a_UIX)]


def _keep_update(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, a_UIX, b_URO, ctx.has_pair, _, ctx.rows, ctx.cut = inputs
    _keep(ctx, x, output[-1], a_UIX, b_URO, ())


def _update_gradients(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    dx, da, *dbs = _gradients(ctx, gradients)
    return dx, da, dbs, None, list(gradients[:-1]), None, None


_update.register_autograd(_update_gradients, setup_context=_keep_update)


# -- scaling ---------------------------------------------------------------------------------------


@torch.library.custom_op("mhr_scale::scale", mutates_args=())
def _scale(y: Tensor, l_UO: Tensor, rows: RowMap, cut: Cut) -> Tensor:
    """y * l[slot]."""
    # contiguous, as the graph was told: gradients may lie otherwise
    return _way(rows, y).times(y, l_UO).to(y.dtype).contiguous()


@_scale.register_fake
def _(y: Tensor, l_UO: Tensor, rows: RowMap, cut: Cut) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("mhr_scale::scale_sums", mutates_args=())
def _scale_sums(g: Tensor, y: Tensor, l_UO: Tensor, rows: RowMap, cut: Cut) -> Tensor:
    """The gradient of l."""
    cut.check()
    return _way(rows, y).sums(g.to(l_UO.dtype) * y, l_UO)


@_scale_sums.register_fake
def _(g: Tensor, y: Tensor, l_UO: Tensor, rows: RowMap, cut: Cut) -> Tensor:
    return torch.empty_like(l_UO)


def _keep_scale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, l_UO, ctx.rows, ctx.cut = inputs
    ctx.save_for_backward(y, l_UO)


def _scale_gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    y, l_UO = ctx.saved_tensors
    needs_y, needs_l, *_ = ctx.needs_input_grad
    step = ctx.rows, ctx.cut
    dy = torch.ops.mhr_scale.scale(g, l_UO, *step).to(y.dtype) if needs_y else None
    dl = torch.ops.mhr_scale.scale_sums(g, y, l_UO, *step) if needs_l else None
    return dy, dl, None, None


_scale.register_autograd(_scale_gradients, setup_context=_keep_scale)
