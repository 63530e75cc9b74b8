"""A file mapped into memory: tensors are views of it, without a copy.

The system reads pages as they are used, keeps them while there is room, and holds them once for all
processes of a machine. Nothing is reserved for pages that somebody might write to, as
`torch.load(mmap=True)` and safetensors do it, whose maps are therefore refused where a file is
larger than memory: T0-11B is one of 44.5 GB. What is written to a view stays in this process.
"""

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mhr_scale.errors import BackboneError
from mhr_scale.run.files import as_size

#: Linux: pages that are written to are not counted before that (Python has the name since 3.13).
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
#: Share of a view's pages that may be missing, or be there, without being single ones.
FEW = 0.01
#: The files that are mapped, by the address where each begins.
_FILES: dict[int, Path] = {}
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


class MappedFile:
    """Ranges of a file as tensors; the map lives as long as any of them."""

    def __init__(self, path: Path) -> None:
        """Map the whole file; no byte is read. Raises `BackboneError` if that is refused."""
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
        _FILES[self._bytes.data_ptr()] = path
        weakref.finalize(pages, _FILES.pop, self._bytes.data_ptr())

    def __len__(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def tensor(self, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The numbers at byte `start`: a view, or a copy where they are not aligned."""
        raw = self._bytes[start : start + prod(shape) * dtype.itemsize]
        if start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(tuple(shape))


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is a view of a mapped file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _FILES


def read_ahead(views: Sequence[Tensor]) -> None:
    """Let the system begin to read what of some views of mapped files is not in memory.

    It returns at once. Touching pages reads them too, but singly where they are missed often, and
    the process waits. Where single pages are missing here and there, which is as slow, all are
    given back first.
    """
    if _LIBRARY is None or not views:
        return
    missing, total = (sum(counts) for counts in zip(*map(_count_pages, views), strict=True))
    if not missing:
        return
    for view in views:
        if FEW * total < missing < (1 - FEW) * total:
            release(view)
        _advise(*_pages_of(view), mmap.MADV_WILLNEED)


def release(view: Tensor) -> None:
    """Give back the memory of a view's pages, which are read again when they are touched.

    Pages that other processes use stay. What was written to the view is lost.
    """
    if _LIBRARY is None:
        return
    base = view.untyped_storage().data_ptr()
    first, size = _pages_of(view, whole=True)
    if size > 0:
        _advise(first, size, mmap.MADV_DONTNEED)
        with suppress(OSError), _FILES[base].open("rb") as file:
            os.posix_fadvise(file.fileno(), first - base, size, os.POSIX_FADV_DONTNEED)


def _pages_of(view: Tensor, *, whole: bool = False) -> tuple[int, int]:
    """Address and size of the pages that a view lies in, or those that hold nothing else."""
    assert is_mapped(view)
    page, start, stop = mmap.PAGESIZE, view.data_ptr(), view.data_ptr() + view.nbytes
    first, last = (-(-start // page), stop // page) if whole else (start // page, -(-stop // page))
    return first * page, (last - first) * page


def _count_pages(view: Tensor) -> tuple[int, int]:
    """How many pages of a view are not in memory, and how many it has."""
    assert _LIBRARY is not None
    first, size = _pages_of(view)
    is_there = np.zeros(size // mmap.PAGESIZE, dtype=np.uint8)
    _LIBRARY.mincore(
        ctypes.c_void_p(first), ctypes.c_size_t(size), is_there.ctypes.data_as(ctypes.c_void_p)
    )
    return len(is_there) - int(np.count_nonzero(is_there & 1)), len(is_there)


def _advise(address: int, size: int, advice: int) -> None:
    assert _LIBRARY is not None
    _LIBRARY.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
