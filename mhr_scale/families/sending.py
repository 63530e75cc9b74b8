"""From the host's memory to a device, without waiting for what the device is at."""

from collections.abc import Sequence

import torch
from torch import Tensor

#: Devices that copy pinned memory beside the host.
BESIDE = ("cuda",)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; of the device itself, that very tensor.

    A GPU copies pinned memory beside the host and keeps its order with kernels that come later;
    torch's allocator holds the memory until it is read. Any other memory makes the host wait until
    all kernels before the copy are done.
    """
    if device.type in BESIDE and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send_numbers(
    numbers: Sequence[int] | Sequence[float],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Numbers of the host as a tensor on `device`: what `torch.tensor` gives, without its wait."""
    return send(torch.tensor(numbers, dtype=dtype), device)
