"""Shards on NVMe: what DeepSpeed needs for them, and memory to fill one in.

Under `zero.Init` DeepSpeed writes every shard of 1 MiB or more to a file as soon as it exists. Its
tensor then has one element and no storage: what is copied into it is lost.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.errors import EngineError

#: DeepSpeed's defaults, in elements: `buffer_size` and `stage3_prefetch_bucket_size`.
BUFFER_SIZE, PREFETCHED = 1e8, 5e7
#: DeepSpeed's default number of such buffers.
BUFFER_COUNT = 5


def check(content: dict[str, Any], blueprint: Blueprint, *, n_ranks: int, op: Any) -> bool:
    """Whether a DeepSpeed file asks for shards on NVMe; raises `EngineError` if that cannot work.

    `op` is DeepSpeed's builder of the asynchronous I/O that reads and writes them.
    """
    offload = content.get("zero_optimization", {}).get("offload_param") or {}
    if offload.get("device") != "nvme":
        return False
    place = "zero_optimization.offload_param"
    if not op.is_compatible():
        raise EngineError(
            f"{place}.device: nvme needs libaio, and no program can be linked with it here; "
            "install libaio-dev (Red Hat: libaio-devel; without rights, unpack it and name its "
            "folders in CFLAGS and LDFLAGS), or use ds_configs/zero3_offload.json"
        )
    prefetch = content["zero_optimization"].get("stage3_prefetch_bucket_size", PREFETCHED)
    if prefetch > 0:
        raise EngineError(
            f"zero_optimization.stage3_prefetch_bucket_size: {prefetch:.0f}, but DeepSpeed would "
            "read a weight that backward needs next after forward twice at once and fail; "
            "set it to 0"
        )
    path = offload.get("nvme_path")
    if path is None or not os.path.isdir(path) or not os.access(path, os.W_OK):
        raise EngineError(
            f"{place}.nvme_path: {path!r} is no folder to write to on this machine; name one on "
            "its NVMe drive"
        )
    with torch.device("meta"):
        model = make_model(blueprint)
    largest = max(-(-parameter.numel() // n_ranks) for parameter in model.parameters())
    if largest > (size := offload.get("buffer_size", BUFFER_SIZE)):
        raise EngineError(
            f"{place}.buffer_size: {size:.0f} numbers, and the largest shard on {n_ranks} rank(s) "
            f"has {largest}; set it to that or more"
        )
    return True


def is_swapped(parameter: Any) -> bool:
    """Whether DeepSpeed keeps this rank's shard of a ZeRO-3 parameter on NVMe."""
    return getattr(parameter.ds_tensor, "final_location", None) == "nvme"


@contextmanager
def in_memory(parameter: Any) -> Iterator[None]:
    """Give a ZeRO-3 parameter's shard memory inside the block; it is written to NVMe at its end.

    The shard is not read from NVMe first: the block has to fill all of it.
    """
    if not is_swapped(parameter):
        yield
        return
    shard, swapper = parameter.ds_tensor, parameter.nvme_swapper
    shard.data = swapper.get_buffer(parameter, shard.ds_numel)
    yield
    swapper.swap_out_and_release([parameter])
