"""Counting bytes and operations of the program's own code, on tensors without memory.

Modules, autograd, recomputation and optimizer run unchanged under torch's fake tensors, so the
counts follow the code. Peaks are kept by segment (which pass, which stack, its first block, its
last or those between), because within a segment they are linear in depth and in rows: those of two
shallow models can be extrapolated to a deep one, which the peak over all segments cannot.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mhr_scale.families.family import Blocks
from mhr_scale.families.fused import as_on_gpu

aten = torch.ops.aten
#: Whose operations are kernels: torch's own, and its variable-length attention.
KERNELS_OF = ("aten", "torch_attn")
#: Allocations that start no kernel.
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense")
#: Operations whose kernels, on CPU and GPU, first copy inputs that are not contiguous.
COPY_FIRST = (
    "_softmax",
    "_log_softmax",
    "_softmax_backward_data",
    "_log_softmax_backward_data",
)
#: Operations that torch counts under another name.
SAME_COUNT = {"addmm_": aten.addmm, "baddbmm_": aten.baddbmm, "linear": aten.mm}
#: Matrix products in attention kernels of the CPU, whose FLOP torch does not count.
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Counts of one step: peak bytes by segment, and operations as {(FLOP, bytes): number}.

    `logits` are the bytes of logits (a number per target token and word of the vocabulary) within
    each segment's peak; `held` are bytes that outlive a step (gradients, optimizer). Counts may be
    fractions, since they come from linear combinations.
    """

    peaks: Mapping[str, float]
    logits: Mapping[str, float]
    held: Mapping[str, float]
    passes: Mapping[tuple[float, float], float]
    update: Mapping[tuple[float, float], float]

    @property
    def peak(self) -> float:
        """The step's peak in bytes, without the weights and the adapter's own tensors."""
        return max(self.peaks.values(), default=0.0)


def combine(parts: Sequence[tuple[float, Trace]]) -> Trace:
    """A linear combination of traces, number by number."""

    def add(name: str) -> dict[Any, float]:
        total: dict[Any, float] = {}
        for factor, trace in parts:
            for key, value in getattr(trace, name).items():
                total[key] = total.get(key, 0.0) + factor * value
        return total

    names = ("peaks", "logits", "held", "passes", "update")
    return Trace(**{name: add(name) for name in names})


@dataclass(slots=True)
class StepCounter:
    """Live bytes and operations of the code inside its `watch` block.

    `n_words` is the size of the vocabulary, which tells logits from other tensors.
    """

    n_words: int
    live: float = 0.0
    live_logits: float = 0.0
    segment: str = "start"
    is_update: bool = False
    peaks: dict[str, float] = field(default_factory=dict)
    logits: dict[str, float] = field(default_factory=dict)
    passes: Counter[tuple[float, float]] = field(default_factory=Counter)
    update: Counter[tuple[float, float]] = field(default_factory=Counter)
    held: dict[str, float] = field(default_factory=dict)
    _known: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)

    @contextmanager
    def watch(self, model: nn.Module, blocks: Mapping[str, Blocks]) -> Iterator["StepCounter"]:
        """Count inside the block; the blocks of the model's stacks mark the segments."""
        for stack, listed in blocks.items():
            for number, name in enumerate(listed.list_modules()):
                which = {0: "first", listed.count - 1: "last"}.get(number, "inner")
                where, module = f"{stack} {which}", model.get_submodule(name)
                self._hooks += [
                    module.register_forward_pre_hook(partial(self._enter, where)),
                    module.register_forward_hook(partial(self._leave, where)),
                ]
        try:
            with _Dispatch(self):
                yield self
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def forget_peaks(self) -> None:
        """Reset peaks and operations; live bytes stay live."""
        for counts in (self.peaks, self.logits, self.passes, self.update):
            counts.clear()

    def trace(self) -> Trace:
        """What has been counted."""
        return Trace(
            peaks=dict(self.peaks),
            logits=dict(self.logits),
            held=dict(self.held),
            passes=dict(self.passes),
            update=dict(self.update),
        )

    # -- segments ----------------------------------------------------------------------------

    def _enter(self, where: str, module: nn.Module, inputs: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        self._begin(f"{'recompute' if in_backward else 'forward'} {where}")

    def _leave(self, where: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._begin(f"after {where}")
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor) and first.grad_fn is not None:
            first.grad_fn.register_prehook(lambda gradients: self._begin(f"backward {where}"))

    def _begin(self, segment: str) -> None:
        self.segment = segment
        self.note()

    def note(self, inside: float = 0.0, logits_inside: float = 0.0) -> None:
        """Update the segment's peak with the live bytes and those inside a kernel."""
        if self.live + inside >= self.peaks.get(self.segment, -1.0):
            self.peaks[self.segment] = self.live + inside
            self.logits[self.segment] = self.live_logits + logits_inside

    # -- storages ----------------------------------------------------------------------------

    def know(self, tensor: Tensor) -> None:
        """Register an input tensor; if it is new here, its memory does not count."""
        for part in _dense_parts(tensor):
            self._watch(part, counts=False)

    def hold(self, tensor: Tensor) -> bool:
        """Register an output of an operation; returns whether it has new memory."""
        return any([self._watch(part, counts=True) for part in _dense_parts(tensor)])

    def is_logits(self, tensor: Tensor) -> bool:
        """Whether a tensor has a number for every word of the vocabulary."""
        is_wide = tensor.dim() > 1 and tensor.shape[-1] == self.n_words
        return is_wide and tensor.is_floating_point()

    def _watch(self, tensor: Tensor, *, counts: bool) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = float(storage.nbytes()) if counts else 0.0
        is_logits = counts and self.is_logits(tensor)
        self.live += size
        self.live_logits += size if is_logits else 0.0
        self._known[key] = weakref.ref(storage, partial(self._free, key, size, is_logits))
        return True

    def _free(self, key: int, size: float, is_logits: bool, storage: Any) -> None:
        del self._known[key]
        self.live -= size
        self.live_logits -= size if is_logits else 0.0


class _Dispatch(TorchDispatchMode):
    """Reports every operation to a counter."""

    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return _any_number(args[0])
        inputs = [*_tensors_in(args), *_tensors_in(kwargs.values())]
        for tensor in inputs:
            self.counter.know(tensor)
        if func is aten._grouped_mm.default:
            result = _grouped_product(*args[:2])
        else:
            result = func(*args, **kwargs)
        outputs = list(_tensors_in((result,)))
        is_new = any([self.counter.hold(tensor) for tensor in outputs])
        name = func._schema.name.split("::")[1]
        copied = [t for t in inputs if name in COPY_FIRST and not t.is_contiguous()]
        logits = [t for t in copied if self.counter.is_logits(t)]
        self.counter.note(sum(map(_numel_bytes, copied)), sum(map(_numel_bytes, logits)))
        is_kernel = func.namespace in KERNELS_OF and name not in NO_KERNEL
        if is_kernel and (is_new or func._schema.is_mutable):
            moved = sum(_numel_bytes(t) for t in (*inputs, *outputs))
            flop = float(_flop(func, name, args, kwargs, result))
            counter = self.counter
            (counter.update if counter.is_update else counter.passes)[flop, moved] += 1
        return result


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values and in lists of them, as operations have them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _any_number(tensor: Tensor) -> float | int | bool:
    """A stand-in for a value that fake tensors do not have: 1, or False for a condition."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.dtype.is_floating_point else 1


def _grouped_product(rows: Tensor, weights: Tensor) -> Tensor:
    """The result of experts' products (N, I) x (E, I, O): torch's fake kernel knows bf16 alone."""
    return rows.new_empty((rows.shape[0], weights.shape[-1]))


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return (tensor,)


def _numel_bytes(tensor: Tensor) -> float:
    if tensor.layout != torch.strided:
        return 0.0
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _flop(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> float:
    if name in ATTENTION:
        query, key = (args[0], args[1]) if "backward" not in name else (args[1], args[2])
        *lead, rows, width = query.shape
        return float(2 * ATTENTION[name] * torch.Size(lead).numel() * rows * key.shape[-2] * width)
    if func is aten._grouped_mm.default:
        return float(2 * args[0].numel() * args[1].shape[-1])
    counted = flop_registry.get(SAME_COUNT.get(name, func._overloadpacket))
    return counted(*args, **kwargs, out_val=result) if counted is not None else 0.0


# -- fake tensors ----------------------------------------------------------------------------------


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make tensors without memory inside the block; the random generator keeps its state."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def give_place(*modules: nn.Module) -> None:
    """Turn the meta tensors of modules into fake tensors of the CPU; ties stay.

    Call it inside `fake_tensors`.
    """
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in (child for root in modules for child in root.modules()):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                like = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                new = nn.Parameter(like, requires_grad=parameter.requires_grad)
                replaced[id(parameter)] = (parameter, new)
            module._parameters[name] = replaced[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Inside, attention, dropout and norms keep for backward what their GPU kernels keep."""
    with as_on_gpu(), _GpuKernels():
        yield


class _GpuKernels(TorchFunctionMode):
    """Calls of some of torch's functions are those of their GPU kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu_kernel: Callable[..., Any] | None = _ON_GPU.get(getattr(func, "__name__", ""))
        return (gpu_kernel or func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None:
        shape = (*query.shape[:-1], key.shape[-2])
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
        attn_mask = attn_mask.expand(shape)
    assert not enable_gqa, "under a mask transformers repeats shared heads before it"
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    output: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs, dropout_p, is_causal, scale=scale
    )[0]
    return output


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    output: Tensor = aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]
    return output


_ON_GPU: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "dropout": _dropout,
    "rms_norm": _rms_norm,
}
