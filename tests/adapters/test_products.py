"""Fused products against autograd's own, and against finite differences in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tiny import Recorder
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.adapters.products import Cut, products, update

OPEN = Cut(is_open=True)
N_IN, N_OUT, RANK, N_ROWS, N_TOKENS = 5, 4, 2, 6, 3


@dataclass(frozen=True)
class Case:
    """Which of the linears that share x have a pair, and for how many slots (0: no dimension)."""

    has_pair: tuple[bool, ...]
    n_slots: int

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list, list]:
        """x, A, the Bs and the frozen weights; all but the weights want gradients."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        lead = (self.n_slots,) if self.n_slots else ()
        x = draw(N_ROWS, N_TOKENS, N_IN).requires_grad_()
        a_UIX = draw(*lead, N_IN, RANK * sum(self.has_pair)).requires_grad_()
        pairs = [
            draw(*lead, RANK, N_OUT).requires_grad_() if has else None for has in self.has_pair
        ]
        return x, a_UIX, pairs, [draw(N_OUT, N_IN) for _ in self.has_pair]


CASES = {
    "alone": Case((True,), 0),
    "alone, 1 slot": Case((True,), 1),
    "alone, 3 slots": Case((True,), 3),
    "three": Case((True, True, True), 0),
    "three, 3 slots": Case((True, True, True), 3),
    "one without": Case((True, False, True), 0),
    "one without, 3 slots": Case((True, False, True), 3),
    "first without, 6 slots": Case((False, True), 6),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def case(request):
    return CASES[request.param]


def fused(x: Tensor, a_UIX: Tensor, pairs: Sequence, weights: Sequence[Tensor]) -> tuple:
    return products(x, a_UIX, pairs, [(weight, None) for weight in weights], cut=OPEN)


def fused_biased(x: Tensor, a_UIX: Tensor, pairs: Sequence, weights: Sequence[Tensor]) -> tuple:
    """The biases are taken off again."""
    biases = [torch.linspace(-1.0, 1.0, N_OUT).to(x) for _ in weights]
    ys = products(x, a_UIX, pairs, [*zip(weights, biases, strict=True)], cut=OPEN)
    return tuple(y - bias for y, bias in zip(ys, biases, strict=True))


def added(x: Tensor, a_UIX: Tensor, pairs: Sequence, weights: Sequence[Tensor]) -> tuple:
    return update(x, a_UIX, pairs, [F.linear(x, weight) for weight in weights], cut=OPEN)


def biased(x: Tensor, a_UIX: Tensor, pairs: Sequence, weights: Sequence[Tensor]) -> tuple:
    """With a bias, a frozen product is a view."""
    zeros = x.new_zeros(N_OUT)
    return update(x, a_UIX, pairs, [F.linear(x, weight, zeros) for weight in weights], cut=OPEN)


def turned(x: Tensor, a_UIX: Tensor, pairs: Sequence, weights: Sequence[Tensor]) -> tuple:
    """Outputs whose rows do not lie one behind the other."""
    outputs = [F.linear(x.transpose(0, 1), weight).transpose(0, 1).clone() for weight in weights]
    assert not any(y.is_contiguous() or y._is_view() for y in outputs)
    return update(x, a_UIX, pairs, outputs, cut=OPEN)


def turned_view(x: Tensor, a_UIX: Tensor, pairs: Sequence, weights: Sequence[Tensor]) -> tuple:
    outputs = [F.linear(x.transpose(0, 1), weight).transpose(0, 1) for weight in weights]
    return update(x, a_UIX, pairs, outputs, cut=OPEN)


def plain(x: Tensor, a_UIX: Tensor, pairs: Sequence, weights: Sequence[Tensor]) -> tuple:
    """The same, one operation after the other."""
    slots = a_UIX if a_UIX.dim() == 3 else a_UIX.unsqueeze(0)
    x_UMI = x.reshape(slots.shape[0], -1, N_IN)
    columns = iter((x_UMI @ slots).split(RANK, -1))
    ys = []
    for weight, b in zip(weights, pairs, strict=True):
        y = x @ weight.T
        if b is not None:
            low = next(columns) @ (b if b.dim() == 3 else b.unsqueeze(0))
            y = y + low.reshape(y.shape)
        ys.append(y)
    return tuple(ys)


WAYS = {
    "products": fused,
    "products with biases": fused_biased,
    "update": added,
    "update of views": biased,
    "update of turned outputs": turned,
    "update of turned views": turned_view,
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def gradients(way, tensors, used):
    """Gradients of x, A and the Bs where only some outputs are used."""
    x, a_UIX, pairs, weights = tensors
    ys = way(x, a_UIX, pairs, weights)
    loss = sum((ys[i] * torch.linspace(-1, 2, ys[i].numel()).view_as(ys[i])).sum() for i in used)
    wanted = [x, a_UIX, *(b for b in pairs if b is not None)]
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def test_outputs_are_those_of_one_operation_after_the_other(case, way):
    tensors = case.tensors()
    torch.testing.assert_close(way(*tensors), plain(*tensors), rtol=1e-12, atol=1e-13)


def test_gradients_are_those_of_finite_differences(case, way):
    x, a_UIX, pairs, weights = case.tensors()
    given = [b for b in pairs if b is not None]

    def run(x, a_UIX, *given):
        rest = iter(given)
        return way(x, a_UIX, [next(rest) if has else None for has in case.has_pair], weights)

    assert torch.autograd.gradcheck(run, (x, a_UIX, *given))


def test_an_output_that_nobody_uses_has_no_part_in_the_gradients(case, way):
    for used in range(len(case.has_pair)):
        found = gradients(way, case.tensors(), [used])
        expected = gradients(plain, case.tensors(), [used])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_inputs_may_lie_in_memory_in_any_order(case, way):
    x, *rest = case.tensors()
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not turned.is_contiguous()
    every = range(len(case.has_pair))
    torch.testing.assert_close(way(turned, *rest), way(x, *rest), rtol=1e-12, atol=1e-13)
    found, expected = gradients(way, (turned, *rest), every), gradients(way, (x, *rest), every)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_what_needs_no_gradient_gets_none(case, way, frozen):
    x, a_UIX, pairs, weights = case.tensors()
    given = [b for b in pairs if b is not None]
    sides = {"x": [x], "A": [a_UIX], "B": given}
    for tensor in sides.pop(frozen):
        tensor.requires_grad_(False)
    ys = way(x, a_UIX, pairs, weights)
    sum(y.square().sum() for y in ys).backward()
    for side in sides.values():
        assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in side)


def test_second_derivatives_are_refused_not_wrong(case, way):
    x, a_UIX, pairs, weights = case.tensors()
    loss = sum(y.pow(3).sum() for y in way(x, a_UIX, pairs, weights))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_autocast_casts_once_and_gradients_keep_the_type_of_their_tensors(case):
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = fused(*tensors)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    expected = plain(*tensors)
    for y, whole in zip(ys, expected, strict=True):
        assert (y - whole).norm() < 0.02 * whole.norm()
    sum(y.sum() for y in ys).backward()
    x, a_UIX, pairs, _ = tensors
    found = [x, a_UIX, *(b for b in pairs if b is not None)]
    assert {tensor.grad.dtype for tensor in found} == {torch.float32}


def test_no_tensor_as_large_as_an_output_is_written_twice():
    """In both directions: a product that is written, then others that are added to it in place."""
    x, a_UIX, pairs, weights = CASES["three, 3 slots"].tensors()
    with Recorder() as recorder:
        ys = fused(x, a_UIX, pairs, weights)
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert recorder.count(["add", "add_", "cat"]) == 1  # the hidden gradients side by side
    assert recorder.count(["baddbmm_"]) == len(weights) + 1
    assert recorder.count(["addmm_"]) == len(weights) - 1
