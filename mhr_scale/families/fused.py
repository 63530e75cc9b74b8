"""Operations that stand for several of transformers', and the classes that use them.

Each keeps for backward what it was given, and computes the rest anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Classes made so far: one for each part and class of transformers'.
_CLASSES: dict[tuple[Any, Any], Any] = {}


def fused_class(part: Any, original: Any) -> Any:
    """The original class with the methods of `part` in front of its own."""
    if (part, original) not in _CLASSES:
        _CLASSES[part, original] = type(f"Fused{original.__name__}", (part, original), {})
    return _CLASSES[part, original]


#: Whether what runs on a CPU stands for a run on a GPU.
_STANDS_FOR_GPU = ContextVar("stands_for_gpu", default=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, operations are those that a GPU would run: a plan counts them where there is none."""
    token = _STANDS_FOR_GPU.set(True)
    try:
        yield
    finally:
        _STANDS_FOR_GPU.reset(token)


def is_on_cpu(x: Tensor) -> bool:
    """Whether an operation on x is to run as it is best on CPUs."""
    if torch.compiler.is_compiling():  # a plan compiles nothing
        return x.device.type == "cpu"
    return x.device.type == "cpu" and not _STANDS_FOR_GPU.get()


def _tanh_gelu(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _tanh_gelu_backward(gradient: Tensor, gate: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.gelu_backward(gradient, gate, approximate="tanh")
    return found


#: Activations of a gate by name, and what each makes of a gradient and its input.
GATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "tanh_gelu": (_tanh_gelu, _tanh_gelu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
}


def gated(gate: Tensor, linear: Tensor, kind: str) -> Tensor:
    """act(gate) * linear, for an activation of `GATES`."""
    product: Tensor = _Gated.apply(gate, linear, kind)
    return product


class _Gated(torch.autograd.Function):
    """Keeps its two inputs and computes the activation anew in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, linear: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, linear)
        ctx.kind = kind
        return GATES[kind][0](gate).mul_(linear)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, linear = ctx.saved_tensors
        activate, differentiate = GATES[ctx.kind]
        d_linear = activate(gate).mul_(gradient)
        return differentiate(gradient * linear, gate), d_linear, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0) -> Tensor:
    """x (..., H) over its root mean square, times weight (H,) + offset; float32 inside.

    On GPUs torch's own kernel. On CPUs torch's is many operations and keeps x in float32.
    """
    if weight.requires_grad or not is_on_cpu(x):
        if offset:
            scale = weight.float() + offset
            return F.rms_norm(x.float(), scale.shape, scale, epsilon).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, epsilon)
    normed: Tensor = _RmsNorm.apply(x, weight, epsilon, offset)
    return normed


class _RmsNorm(torch.autograd.Function):
    """Keeps x and a number for each of its rows; the frozen weight is referenced, not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
        wide = _wide(x)
        rate = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, rate)
        ctx.weight, ctx.offset = weight, offset
        return (wide * rate).mul_(_scale(weight, offset)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, rate = ctx.saved_tensors
        normed = _wide(x) * rate
        d_normed = _wide(gradient) * _scale(ctx.weight, ctx.offset)
        shared = (d_normed * normed).mean(-1, keepdim=True)
        dx = d_normed.sub_(normed.mul_(shared)).mul_(rate)
        return dx.to(x.dtype), None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale(weight: Tensor, offset: float) -> Tensor:
    return _wide(weight) + offset if offset else weight
