"""What one step does, counted: operations, kernels, flops, bytes, gathers; and GPUs to judge it by.

Counting on the meta device needs no memory and no arithmetic, so that steps of T5-XXL are counted
at their real shapes, in the code that really runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
#: Tensors that one launch of a multi-tensor kernel takes (torch packs 30 to 110 by their number).
TENSORS_PER_LAUNCH = 48
#: Operations that neither launch a kernel nor move a byte, beside views.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "alias"}
#: Operations that read only the rows they return.
GATHERING = {"embedding", "index_select"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """A GPU: dense bfloat16 flop/s and memory bytes/s at their peaks, and the shares reached."""

    name: str
    flops: float
    bandwidth: float
    flops_share: float
    bandwidth_share: float = 0.8
    launch_seconds: float = 5e-6
    """Host time of one launch, eager PyTorch at its best."""
    shortest_kernel_seconds: float = 2.5e-6

    def kernel_seconds(self, flops: float, bytes_moved: float) -> float:
        """Time of one kernel on the device."""
        computed = flops / (self.flops * self.flops_share)
        moved = bytes_moved / (self.bandwidth * self.bandwidth_share)
        return max(computed, moved, self.shortest_kernel_seconds)


CHIPS = (
    Chip(name="A100", flops=312e12, bandwidth=2.04e12, flops_share=0.75),
    Chip(name="H100", flops=989e12, bandwidth=3.35e12, flops_share=0.65),
)


@dataclass(slots=True)
class Counts:
    """What was dispatched: operations, of these kernels, and the device time of each chip."""

    operations: int = 0
    kernels: int = 0
    flops: float = 0.0
    bytes_moved: float = 0.0
    reads_by_host: int = 0
    device_seconds: tuple[float, ...] = (0.0,) * len(CHIPS)

    def per(self, number: int) -> dict[str, Any]:
        """Means per job as JSON values."""
        return {
            "operations": self.operations / number,
            "kernels": self.kernels / number,
            "flops": self.flops / number,
            "bytes_moved": self.bytes_moved / number,
            "reads_by_host": self.reads_by_host / number,
        }


class Counter(TorchDispatchMode):
    """Counts every operation that reaches a kernel library, backward passes included.

    Kernels, flops and bytes are those of `device` alone. What the host reads from the meta device
    is answered with zeros and "true".
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.counts = Counts()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        answer = _host_reads(func, args, kwargs)
        out = func(*args, **kwargs) if answer is None else answer
        self._note(func, args, kwargs, out, is_read=answer is not None)
        return out

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, *, is_read: bool
    ) -> None:
        counts, name = self.counts, func._overloadpacket.__name__
        counts.operations += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if not any(tensor.device.type == self.device for tensor in tensors):
            return
        if func is aten._local_scalar_dense.default or is_read:
            counts.reads_by_host += 1
            return
        if func.is_view or name in FREE:
            return
        launches = 1
        if name.startswith("_foreach"):
            launches = math.ceil(len(args[0]) / TENSORS_PER_LAUNCH)
        flops = 0.0
        if func._overloadpacket in flop_registry:
            flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
        written = _bytes(out)
        moved = 2 * written if name in GATHERING else _bytes((args, kwargs)) + written
        counts.kernels += launches
        counts.flops += flops
        counts.bytes_moved += moved
        counts.device_seconds = tuple(
            total + max(chip.kernel_seconds(flops, moved), launches * chip.shortest_kernel_seconds)
            for total, chip in zip(counts.device_seconds, CHIPS, strict=True)
        )


def _host_reads(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The answer to an operation that brings numbers of a meta tensor to the host, else None."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.device.type != "meta":
        return None
    if func is aten._local_scalar_dense.default:
        return True if first.dtype == torch.bool else 0
    if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
        return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
    return None


def _bytes(values: Any) -> float:
    return float(
        sum(
            leaf.numel() * leaf.element_size()
            for leaf in tree_leaves(values)
            if isinstance(leaf, Tensor)
        )
    )


def count(step: Callable[[], object], *, device: str = "cpu") -> Counts:
    """Count one call."""
    with Counter(device) as counter:
        step()
    return counter.counts


# -- gathers of a sharded backbone -----------------------------------------------------------------


@dataclass(slots=True)
class Gathers:
    """All-gathers of frozen weights: calls, and bytes of the gathered tensors on one rank."""

    calls: int = 0
    bytes_gathered: int = 0


@contextmanager
def counted_gathers() -> Iterator[Gathers]:
    """Count what DeepSpeed gathers inside the block."""
    from deepspeed import comm

    found, gather = Gathers(), comm.allgather_fn

    def counting(output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        found.calls += 1
        found.bytes_gathered += output_tensor.numel() * output_tensor.element_size()
        return gather(output_tensor, input_tensor, **options)

    with mock.patch.object(comm, "allgather_fn", counting):
        yield found


# -- a GPU, from counted numbers -------------------------------------------------------------------


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Lets steps run on the meta device with the operations that a GPU would get.

    Attention is one kernel forward and one backward, as under a position bias; autocast is off.
    """

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        bias = None
        if options.get("enable_gqa"):
            shared = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(shared, dim=-3) for t in (key, value))
        if attn_mask is not None:
            shape = (*query.shape[:-1], key.shape[-2])
            bias = attn_mask.to(query.dtype).expand(shape)
        out: Tensor = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, scale=options.get("scale")
        )[0]
        return out

    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend),
        mock.patch.object(clip_grad, "_has_foreach_support", return_value=True),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "autocast", return_value=nullcontext()),
    ):
        yield
