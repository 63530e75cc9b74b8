"""What a pass of `step_time.py` keeps and dispatches: live bytes, bytes saved, kernels, waits."""

import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from device_waits import READS
from few_shot_counts import FREE
from step_time_ways import Setting, Way
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


class Live(TorchDispatchMode):
    """Counts what is dispatched, and the bytes of tensors made inside the block and still alive.

    `known` tensors were there before. What a kernel needs within itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in known}
        self.now = self.peak = 0
        self.operations = self.kernels = self.waits = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        self.operations += 1
        self.kernels += not (operation.is_view or name in FREE)
        self.waits += name in READS
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_sparse:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def tensors_of(way: Way) -> list[Tensor]:
    """Weights and buffers of a way, the adapter's among them."""
    return [*way.model.parameters(), *way.model.buffers()]


def counted(way: Way, setting: Setting) -> dict[str, float]:
    """A pass of a way: peak and saved MiB, operations and kernels each way, waits of the host.

    Operations include views, which launch nothing; kernels do not.
    """
    with way.around():
        with Live(tensors_of(way)) as whole:
            loss = way.forward()
        with whole, Live([]) as backward:
            way.backward(loss)
    del loss
    way.clear()
    peak = whole.peak
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way.step()
        peak = torch.cuda.max_memory_allocated() - start
    return {
        "peak_mib": peak / MIB,
        "saved_mib": saved_bytes(way) / MIB,
        "forward_operations": whole.operations - backward.operations,
        "backward_operations": backward.operations,
        "forward_kernels": whole.kernels - backward.kernels,
        "backward_kernels": backward.kernels,
        "waits": whole.waits,
    }


def saved_bytes(way: Way) -> int:
    """Bytes that autograd keeps between the passes, weights and a tensor's second use apart."""
    before = {tensor.untyped_storage()._cdata for tensor in tensors_of(way)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in before:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with way.around():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = way.forward()
        way.backward(loss)
    way.clear()
    return sum(saved.values())
