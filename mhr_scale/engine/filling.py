"""Loading the weights of a frozen backbone: each rank reads its own range of each tensor only."""

from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.backbone import quantise
from mhr_scale.backbone.blueprint import Blueprint, plan_copies
from mhr_scale.backbone.weights import WeightSource, read_whole
from mhr_scale.engine import nvme
from mhr_scale.errors import EngineError
from mhr_scale.run.runlog import ByteProgress


@torch.no_grad()
def fill(
    model: nn.Module, blueprint: Blueprint, *, kind: str, rank: int | None, device: torch.device
) -> None:
    """Load every weight of a blueprint into the model, under a progress bar.

    `rank` is this process's rank among those that a ZeRO-3 model is sharded over, None for a
    replicated model; linears of the latter that are on the meta device get quantised to `kind`.
    """
    copies, source = plan_copies(model, blueprint), blueprint.source
    total = sum(_held_bytes(parameter, rank) for parameter in copies.values())
    progress = ByteProgress(total, what="read backbone")
    for name, parameter in copies.items():
        if rank is None:
            _fill_whole(model, name, parameter, source, kind=kind, device=device)
        else:
            with nvme.in_memory(parameter):
                _fill_shards(name, parameter, source, rank=rank)
        progress.add(name, _held_bytes(parameter, rank))
    progress.close()


def _fill_whole(
    model: nn.Module,
    name: str,
    parameter: nn.Parameter,
    source: WeightSource,
    *,
    kind: str,
    device: torch.device,
) -> None:
    target = parameter.data
    weight = read_whole(source, name)
    if target.is_meta:
        quantise.put(model, name, weight.to(target.dtype), kind, device)
    else:
        target.copy_(weight)


def _fill_shards(name: str, parameter: Any, source: WeightSource, *, rank: int) -> None:
    for shard, number in shards_of(parameter, rank):
        start, stop = share(number, shard.numel(), whole=parameter.ds_numel)
        shard.zero_()
        if stop > start:
            shard[: stop - start].copy_(source.read(name, start, stop))


def _held_bytes(parameter: Any, rank: int | None) -> int:
    """Bytes of a parameter that a rank holds, in memory or on NVMe."""
    if rank is None:
        return int(parameter.data.nbytes)
    if nvme.is_swapped(parameter):
        return int(parameter.ds_tensor.ds_numel * parameter.element_size())
    return sum(shard.nbytes for shard, _ in shards_of(parameter, rank))


def share(number: int, n_held: int, *, whole: int) -> tuple[int, int]:
    """The range [start, stop) of a flattened tensor of `whole` elements in shard `number`.

    Every shard has `n_held` elements; the last ones are padded.
    """
    start = min(number * n_held, whole)
    return start, min(start + n_held, whole)


def shards_of(parameter: Any, rank: int) -> list[tuple[Tensor, int]]:
    """A rank's flat shards of a ZeRO-3 parameter, each with its number.

    ZeRO++ adds a secondary shard, over the ranks of a node, which DeepSpeed copies from a frozen
    weight once and never refreshes. Raises `EngineError` if shards are quantised.
    """
    secondary = getattr(parameter, "ds_secondary_tensor", None)
    shards = [(parameter.ds_tensor, rank)]
    if secondary is not None:
        shards.append((secondary, rank % parameter.ds_secondary_tensor_group_size))
    if any(hasattr(shard, "ds_quant_scale") for shard, _ in shards):
        raise EngineError(
            "zero_optimization.zero_quantized_nontrainable_weights: weights are read into plain "
            "shards; set it to false (backbone.quantise quantises replicated backbones)"
        )
    return [(shard.data, number) for shard, number in shards]
