"""Where the host would wait for a GPU, told without one: the meta device stands for it.

Modules, autograd and optimizers run unchanged; what a GPU would have to be asked for is answered
with ones (a condition with False), so that a step goes on. A wait is a number read by the host, an
operation whose result has a size that the device alone knows, or a copy of the host's memory that
does not return at once: without `non_blocking`, or from memory that is not pinned.
On a GPU itself torch tells (`counted_on_gpu`), but not of the last kind.
"""

import linecache
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mhr_scale
from mhr_scale.families import sending

META = torch.device("meta")
ROOT = str(Path(mhr_scale.__file__).parent)
#: Operations whose result, or its size, the host has to wait for.
READS = (
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "_coalesce", "bincount"),
)
#: Functions that make a tensor of Python's numbers, which they copy to its device at once.
MAKERS = ("tensor", "as_tensor", "asarray", "new_tensor")

#: How often the host waits, by the place in the package (or else in whoever calls torch) and why.
Waits = Counter[str]


def waits_of(work: Any, *, device: torch.device = META) -> Waits:
    """How often the host waits in a call, by place."""
    with counted_on_gpu() if device.type == "cuda" else counted() as waits:
        work()
    return waits


@contextmanager
def counted() -> Iterator[Waits]:
    """Count on the meta device. What autocast would do there, which has none, is left out."""
    waits: Waits = Counter()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", return_value=nullcontext()))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", return_value=False))
        stack.enter_context(mock.patch.object(sending, "BESIDE", ("cuda", "meta")))
        pinned: set[int] = set()
        stack.enter_context(_Functions(waits, pinned))
        stack.enter_context(_Operations(waits, pinned))
        yield waits


@contextmanager
def counted_on_gpu() -> Iterator[Waits]:
    """Count on the GPU: torch's own warnings, by the line that they name."""
    waits: Waits = Counter()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in told:
        if "synchronizing CUDA operation" in str(one.message):
            waits[f"{_short(one.filename)}:{one.lineno} waits"] += 1


class _Functions(TorchFunctionMode):
    """What can be told from the call only: the meta device has no numbers to copy."""

    def __init__(self, waits: Waits, pinned: set[int]) -> None:
        super().__init__()
        self.waits, self.pinned = waits, pinned
        self.kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("pin_memory", "is_pinned"):
            return self._pinned(name, args[0])
        is_pinned = kwargs.pop("pin_memory", False)
        if name in MAKERS and not isinstance(args[-1], Tensor):
            of = args[0].device if name == "new_tensor" else None
            if torch.device(kwargs.get("device") or of or "cpu") == META:
                self.waits[f"{_place()} copies Python's numbers"] += 1
        if name in ("__getitem__", "__setitem__") and args[0].is_meta:
            found = self._index(name, *args)
            if found is not None:
                return found
        result = func(*args, **kwargs)
        if is_pinned:
            self._remember(result)
        return result

    def _pinned(self, name: str, tensor: Tensor) -> Any:
        if name == "is_pinned":
            return tensor.untyped_storage()._cdata in self.pinned
        assert tensor.device.type == "cpu", "only the host's memory can be pinned"
        return self._remember(tensor.clone())

    def _remember(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.untyped_storage()._cdata)
        self.kept.append(tensor)  # or another would have its place
        return tensor

    def _index(self, name: str, tensor: Tensor, index: Any, *values: Any) -> Any:
        """Note an index that has to be copied, or whose result has an unknown size."""
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            is_tensor = isinstance(part, Tensor)
            if isinstance(part, list) or type(part).__module__ == "numpy":
                self.waits[f"{_place()} indexes by a list"] += 1
            elif is_tensor and part.is_meta and part.dtype in (torch.bool, torch.uint8):
                is_filled = values and not (isinstance(values[0], Tensor) and values[0].dim())
                if not is_filled:  # a number is filled in under the mask
                    self.waits[f"{_place()} indexes by a mask"] += 1
                return tensor if values else tensor.new_empty(1, *tensor.shape[part.dim() :])
        return None


class _Operations(TorchDispatchMode):
    """Everything that reaches a device."""

    def __init__(self, waits: Waits, pinned: set[int]) -> None:
        super().__init__()
        self.waits, self.pinned = waits, pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, args, kwargs)
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if name in READS:
            self.waits[f"{_place()} {name}"] += 1
            return _answer(name, args)
        hosts = [t for t in tensors if t.is_cpu and t.dim()]
        if hosts and name != "set_":
            self.waits[f"{_place()} {name} takes a tensor of the host"] += 1
        return func(*args, **kwargs)

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "_to_copy":
            source, target = args[0], kwargs.get("device") or args[0].device
            is_blocking = not kwargs.get("non_blocking")
        else:
            source, target = args[1], args[0].device
            is_blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        target = torch.device(target)
        if source.is_meta and target.type == "cpu":
            self.waits[f"{_place()} reads"] += 1
            dtype = kwargs.get("dtype") or source.dtype
            found = torch.full(source.shape, dtype != torch.bool, dtype=dtype)
            return args[0].copy_(found) if name == "copy_" else found
        if source.is_cpu and target == META and source.numel():
            if is_blocking:
                self.waits[f"{_place()} copies to the device and waits"] += 1
            elif source.untyped_storage()._cdata not in self.pinned:
                self.waits[f"{_place()} copies from memory that is not pinned"] += 1
        return func(*args, **kwargs)


def _answer(name: str, args: Any) -> Any:
    """Stands for what the device alone knows."""
    first = args[0]
    if name in ("_local_scalar_dense", "is_nonzero"):
        if name == "is_nonzero" or first.dtype == torch.bool:
            return False
        return 1.0 if first.dtype.is_floating_point else 1
    if name == "equal":
        return False
    if name == "_coalesce":
        return first._coalesced_(True)
    if name == "nonzero":
        return first.new_empty(1, first.dim(), dtype=torch.long)
    raise NotImplementedError(f"{name} on the meta device: its result has no known size")


def _place() -> str:
    """The innermost line of the package in the stack, or of who calls torch."""
    frame: Any = sys._getframe(1)
    outside = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT):
            return f"{_short(file)}:{frame.f_lineno}" + (f" ({outside})" if outside else "")
        is_torch = "/torch/" in file or file == __file__ or "contextlib" in file
        if not outside and not is_torch and linecache.getline(file, frame.f_lineno):
            outside = f"{_short(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return outside


def _short(file: str) -> str:
    return file.rsplit("site-packages/", 1)[-1].removeprefix(str(Path(ROOT).parent) + "/")
