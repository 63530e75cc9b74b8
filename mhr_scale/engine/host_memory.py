"""Host memory: what the C library keeps of freed blocks, and pinned buffers on the way to a GPU."""

import ctypes
import platform
from typing import Any

import torch
from torch import Tensor

from mhr_scale.run.files import as_size
from mhr_scale.run.runlog import log

#: `mallopt`'s name for the size from which a block has a mapping of its own (malloc.h).
M_MMAP_THRESHOLD = -3
THRESHOLD = 1 << 20
#: Bytes of each of the two pinned buffers.
STAGE = 64 << 20


def give_back_freed_blocks() -> None:
    """Let the C library give large blocks back as soon as they are freed.

    ZeRO-3 on a CPU gathers and frees every weight in turn, in blocks of its size. glibc raises the
    size from which blocks are mapped whenever one is freed, and keeps what is below it: 8 GiB a
    rank at 3 billion weights, where 4 are in use.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    if ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, THRESHOLD):
        log.info("freed blocks of %s or more go back to the system at once", as_size(THRESHOLD))


class Stager:
    """Copies numbers of mapped files to where a backbone lies.

    To a GPU through two pinned buffers in turn: one is filled from the file, and cast, while the
    other is on its way. No other host memory is taken, and no copy waits for the one before it.
    """

    def __init__(self, device: torch.device, *, n_bytes: int = STAGE) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._n_bytes = n_bytes
        self._buffers: list[Tensor] = []
        self._sent: list[Any] = []
        self._turn = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Fill a contiguous tensor; its numbers are there once the device gets to them."""
        self.copy_through(target, source) if self._on_gpu else target.copy_(source)

    def place(self, source: Tensor) -> Tensor:
        """A copy of a tensor where the backbone lies."""
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        self.copy(target, source)
        return target

    def copy_through(self, target: Tensor, source: Tensor) -> None:
        """Fill a contiguous tensor by way of the buffers, chunk by chunk."""
        target, source = target.view(-1), source.reshape(-1)
        step = self._n_bytes // target.element_size()
        for start in range(0, target.numel(), step):
            chunk = source[start : start + step]
            buffer = self._next_buffer()[: chunk.numel() * target.element_size()].view(target.dtype)
            buffer.copy_(chunk)
            target[start : start + step].copy_(buffer, non_blocking=True)
            if self._on_gpu:
                self._sent[self._turn].record()

    def _next_buffer(self) -> Tensor:
        """The buffer whose turn it is, once what was in it has arrived."""
        self._turn = 1 - self._turn
        if not self._buffers:
            self._buffers = [
                torch.empty(self._n_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
                for _ in range(2)
            ]
            self._sent = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        if self._on_gpu:
            self._sent[self._turn].synchronize()
        return self._buffers[self._turn]
