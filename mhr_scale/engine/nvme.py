"""Shards on NVMe: what DeepSpeed needs for them, and the memory in which one is filled.

Under `zero.Init` DeepSpeed writes every shard of a MiB and more to a file as it is made. From then
on the tensor that stands for it holds one number and no memory: what is copied there is lost.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.errors import EngineError

#: DeepSpeed's own values where a file has none, in numbers: `buffer_size`, and what is prefetched.
BUFFER_SIZE, PREFETCHED = 1e8, 5e7


def check(content: dict[str, Any], blueprint: Blueprint, *, n_ranks: int, op: Any) -> None:
    """Raise `EngineError` if a DeepSpeed file wants shards on NVMe that cannot be put there.

    `op` is DeepSpeed's builder of the operation that reads and writes them.
    """
    offload = content.get("zero_optimization", {}).get("offload_param") or {}
    if offload.get("device") != "nvme":
        return
    place = "zero_optimization.offload_param"
    if not op.is_compatible():
        raise EngineError(
            f"{place}.device: nvme needs libaio, and no program can be linked with it here; "
            "install libaio-dev (Red Hat: libaio-devel; without rights, unpack it and name its "
            "folders in CFLAGS and LDFLAGS), or use ds_configs/zero3_offload.json"
        )
    ahead = content["zero_optimization"].get("stage3_prefetch_bucket_size", PREFETCHED)
    if ahead > 0:
        raise EngineError(
            f"zero_optimization.stage3_prefetch_bucket_size: {ahead:.0f}, but DeepSpeed would read "
            "a weight that backward needs next after forward twice at once and fail; set it to 0"
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


def is_swapped(parameter: Any) -> bool:
    """Whether DeepSpeed keeps this rank's shard of a ZeRO-3 parameter on NVMe."""
    return getattr(parameter.ds_tensor, "final_location", None) == "nvme"


@contextmanager
def in_memory(parameter: Any) -> Iterator[None]:
    """The block in which a ZeRO-3 parameter's shard has memory to be filled, written to NVMe after.

    What was there is not read: the block has to fill all of it.
    """
    if not is_swapped(parameter):
        yield
        return
    shard, swapper = parameter.ds_tensor, parameter.nvme_swapper
    shard.data = swapper.get_buffer(parameter, shard.ds_numel)
    yield
    swapper.swap_out_and_release([parameter])
