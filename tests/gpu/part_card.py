"""Rates of the card itself, against which the other parts hold theirs."""

import statistics
import time
from collections.abc import Callable

import torch
from board import Board, Found, Scale
from torch import Tensor

TURNS = 7


def measure(board: Board, scale: Scale) -> None:
    """Matrix products in bf16, memory, copies from and to the host, kernel launches."""
    board.run("matrix products", lambda: matrix_products(scale))
    board.run("memory", lambda: memory(scale))
    board.run("copies", lambda: copies(scale))
    board.run("launches", lambda: launches(scale))


def matrix_rate(board: Board, scale: Scale) -> float:
    """FLOP/s of a bf16 product on this card, measured unless the board has it."""
    known = board.values("card", "matrix products").get("flops_per_s")
    return float(known or matrix_products(scale).values["flops_per_s"] or 0.0)


def seconds(work: Callable[[], object], scale: Scale, *, repeats: int = 10) -> float:
    """Median seconds of one call among `TURNS` series of `repeats` calls; one series warms up."""
    found = []
    for _ in range(TURNS + 1):
        synchronize(scale)
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(scale)
        found.append((time.perf_counter() - begun) / repeats)
    return statistics.median(found[1:])


def synchronize(scale: Scale) -> None:
    """Wait for the device."""
    if scale.on_gpu:
        torch.cuda.synchronize(scale.device)


def matrix_products(scale: Scale) -> Found:
    """bf16 products of random numbers (zeros would be faster than any model's)."""
    width = 128 if scale.is_tiny else 8192
    x, y = (_random(width, width, scale) for _ in range(2))
    took = seconds(lambda: x @ y, scale)
    return Found({"flops_per_s": 2.0 * width**3 / took, "width": width})


def memory(scale: Scale) -> Found:
    """Bytes read and written by a copy on the device."""
    x = _random(1 if scale.is_tiny else 1024, 2**20, scale)
    y = torch.empty_like(x)
    took = seconds(lambda: y.copy_(x), scale)
    return Found({"bytes_per_s": 2.0 * x.nbytes / took})


def copies(scale: Scale) -> Found:
    """Bytes from and to the host's pinned memory."""
    host = torch.empty(
        2**18 if scale.is_tiny else 2**28, dtype=torch.uint8, pin_memory=scale.on_gpu
    )
    device = torch.empty_like(host, device=scale.device)
    up = seconds(lambda: device.copy_(host, non_blocking=True), scale)
    down = seconds(lambda: host.copy_(device, non_blocking=True), scale)
    return Found({"up_bytes_per_s": host.nbytes / up, "down_bytes_per_s": host.nbytes / down})


def launches(scale: Scale) -> Found:
    """Seconds of a kernel that has nothing to do, through torch's dispatcher."""
    x = torch.zeros(1, device=scale.device)
    return Found({"seconds": seconds(lambda: x.add_(1.0), scale, repeats=200)})


def _random(rows: int, columns: int, scale: Scale) -> Tensor:
    return torch.randn(rows, columns, device=scale.device, dtype=torch.bfloat16)
