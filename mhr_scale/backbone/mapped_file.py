"""A file mapped into memory: tensors are views of it, without a copy.

The system reads pages as they are used, keeps them while there is room, and holds them once for all
processes of a machine. Nothing is reserved for pages that somebody might write to, as
`torch.load(mmap=True)` and safetensors do it, whose maps are therefore refused where a file is
larger than memory: T0-11B is one of 44.5 GB. What is written to a view stays in this process.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mhr_scale.errors import BackboneError
from mhr_scale.run.files import as_size

#: Linux: pages that are written to are not counted before that (Python has the name since 3.13).
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


class MappedFile:
    """Ranges of a file as tensors; the map lives as long as any of them."""

    def __init__(self, path: Path) -> None:
        """Map the whole file; no byte is read. Raises `BackboneError` if that is refused."""
        self.path = path
        size = path.stat().st_size
        flags, protection = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            with path.open("rb") as file:
                pages = mmap.mmap(file.fileno(), size, flags=flags, prot=protection)
        except OSError as error:
            raise BackboneError(
                f"{path}: {as_size(size)} cannot be mapped into memory ({error.strerror}); that "
                "takes address space alone: raise the limit (ulimit -v, vm.overcommit_memory)"
            ) from error
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8)

    def __len__(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def tensor(self, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The numbers at byte `start`: a view, or a copy where they are not aligned."""
        raw = self._bytes[start : start + prod(shape) * dtype.itemsize]
        if start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(tuple(shape))


def read_ahead(tensor: Tensor) -> None:
    """Let the system begin to read what of a tensor's file is not in memory; returns at once.

    Touching pages reads them too, but after some hundred misses the system reads a page at a time,
    thirty times slower than it could. Does nothing for other tensors than views of mapped files.
    """
    if _LIBRARY is None or not tensor.numel() or tensor.device.type != "cpu":
        return
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    last = tensor.data_ptr() + tensor.nbytes
    _LIBRARY.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_WILLNEED)
