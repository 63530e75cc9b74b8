"""Placements of the frozen weights, and what a rank holds and moves under each.

Frozen weights have no gradients and no optimizer state: a placement concerns the weights alone, and
how many of them are gathered at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.backbone.quantise import BLOCK, list_linears
from mhr_scale.engine.ds_config import read_ds_config
from mhr_scale.engine.nvme import BUFFER_COUNT, BUFFER_SIZE, PREFETCHED
from mhr_scale.planning.hardware import Machines

#: How often a training pass gathers each weight: in forward and in backward (with recomputation).
#: Measured with DeepSpeed 0.19: non-reentrant recomputation gathers once more.
GATHERS = {"none": 2.0, "reentrant": 2.1, "non_reentrant": 2.9}
#: Bytes of a scale per row (int8), and per block with double quantisation (nf4).
INT8_ROW, NF4_BLOCK = 4.0, 1.0 + 4.0 / 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Parameter counts of a backbone: in all, in the linears of blocks, of the largest tensors."""

    total: int
    in_blocks: int
    rows_in_blocks: int
    largest: int
    largest_in_blocks: int


def weigh(blueprint: Blueprint) -> Weights:
    """Count a backbone's parameters on the meta device."""
    with torch.device("meta"):
        model = make_model(blueprint)
    linears = list_linears(model, blueprint).values()
    sizes = [linear.weight.numel() for linear in linears]
    return Weights(
        total=sum(parameter.numel() for parameter in model.parameters()),
        in_blocks=sum(sizes),
        rows_in_blocks=sum(linear.out_features for linear in linears),
        largest=max(parameter.numel() for parameter in model.parameters()),
        largest_in_blocks=max(sizes, default=0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One way to hold the frozen weights: DeepSpeed file, data type and quantisation."""

    name: str
    ds_config: str
    dtype: str
    quantise: str = "none"
    is_mapped: bool | None = None
    """Whether weights are views of their files; None where they cannot be: not on a CPU."""
    is_sharded: bool = False
    keeps_node_copy: bool = False
    offload: str = "none"

    @property
    def settings(self) -> dict[str, str]:
        """The recipe's settings that select it, apart from recomputation."""
        settings = {
            "run.ds_config": self.ds_config,
            "backbone.dtype": self.dtype,
            "backbone.quantise": self.quantise,
        }
        if self.is_mapped is False:
            settings["backbone.mapped"] = "false"
        return settings

    @property
    def can_be_compiled(self) -> bool:
        """Whether `backbone.compile` is for it: whole weights in every rank."""
        return not self.is_sharded and self.quantise == "none"

    @property
    def is_resident(self) -> bool:
        """Whether the GPUs hold all weights together."""
        return self.offload == "none"


def list_placements(machines: Machines, dtype: str, *, stored: str = "none") -> list[Placement]:
    """The placements that make sense on these machines, for a recipe with this data type.

    Of a folder whose linears are `stored` quantised there is one. No placement is of wider numbers
    than the recipe's: it would take more, and more time. On CPUs replicated weights may be mapped,
    and there is no host to offload them to: its memory is the ranks' own.
    """
    if stored != "none":
        quantised = Placement(
            name=f"replicated {stored}{'' if machines.on_gpu else ', mapped'}",
            ds_config="ds_configs/replicated.json",
            dtype=dtype,
            quantise=stored,
            is_mapped=None if machines.on_gpu else True,
        )
        return [quantised]
    placements = [
        Placement(
            name=f"replicated {name}{', mapped' if is_mapped else ''}",
            ds_config="ds_configs/replicated.json",
            dtype=replicated_dtype,
            is_mapped=is_mapped,
        )
        for name, replicated_dtype in (("bf16", "bfloat16"), ("fp32", "float32"))
        if replicated_dtype in ("bfloat16", dtype)
        for is_mapped in ((None,) if machines.on_gpu else (True, False))
    ]
    placements += [
        Placement(
            name=f"replicated {kind}",
            ds_config="ds_configs/replicated.json",
            dtype=dtype,
            quantise=kind,
        )
        for kind in ("int8", "nf4")
    ]
    sharded = Placement(
        name="zero3", ds_config="ds_configs/zero3.json", dtype=dtype, is_sharded=True
    )
    if machines.ranks > 1:
        placements.append(sharded)
    if machines.nodes > 1 and machines.ranks_per_node > 1:
        plus = replace(sharded, name="zero3 plusplus", ds_config="ds_configs/zero3_plusplus.json")
        placements.append(replace(plus, keeps_node_copy=True))
    for kind, file in (("cpu", "zero3_offload"), ("nvme", "zero3_nvme")):
        if kind == "cpu" and not machines.on_gpu:
            continue
        name, ds_config = f"zero3 offload {kind}", f"ds_configs/{file}.json"
        placements.append(replace(sharded, name=name, ds_config=ds_config, offload=kind))
    return placements


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a placement costs one rank, in bytes; moved bytes are for using every weight once."""

    weights: float
    gathered: float
    host: float
    """Of a machine's memory, beside its ranks' own: offloaded weights, buffers for NVMe."""
    mapped: float
    """Of a machine's file cache, as far as there is room: files whose views the weights are."""
    over_links: float
    over_network: float
    from_host: float
    from_nvme: float
    unpacked: float


def load_of(placement: Placement, weights: Weights, machines: Machines) -> Load:
    """The load of one rank of these machines under a placement of these weights."""
    size = 2.0 if placement.dtype == "bfloat16" else 4.0
    total = size * weights.total
    replicated = Load(
        weights=total,
        gathered=0.0,
        host=0.0,
        mapped=0.0,
        over_links=0.0,
        over_network=0.0,
        from_host=0.0,
        from_nvme=0.0,
        unpacked=0.0,
    )
    if placement.quantise != "none":
        held = _quantised(placement.quantise, weights, size)
        return replace(
            replicated,
            weights=0.0 if placement.is_mapped else held,
            mapped=held if placement.is_mapped else 0.0,
            gathered=size * weights.largest_in_blocks,
            unpacked=(1.0 + size) * weights.in_blocks,
        )
    if placement.is_mapped:
        return replace(replicated, weights=0.0, mapped=total)
    if not placement.is_sharded:
        return replicated
    zero = read_ds_config(placement.ds_config, asks_deepspeed=False)["zero_optimization"]
    n, per_node = machines.ranks, machines.ranks_per_node
    live, is_kept = _live(zero, weights)
    moved = 0.0 if is_kept else total
    shard, node_copy = total / n, total / per_node if placement.keeps_node_copy else 0.0
    of_machine = 0.0 if placement.is_resident else total / machines.nodes
    on_host = of_machine if placement.offload == "cpu" else 0.0
    if placement.offload == "nvme":
        on_host = per_node * size * _staged(zero["offload_param"])
    crosses = machines.nodes > 1 and not placement.keeps_node_copy
    peers = per_node if placement.keeps_node_copy else n
    return replace(
        replicated,
        weights=(shard if placement.is_resident else 0.0) + node_copy,
        gathered=size * live,
        host=on_host,
        over_links=0.0 if crosses else moved * (peers - 1) / peers,
        over_network=moved * (n - 1) / n if crosses else 0.0,
        from_host=0.0 if placement.is_resident else (0.0 if is_kept else shard),
        from_nvme=of_machine if placement.offload == "nvme" and not is_kept else 0.0,
    )


def _live(zero: Mapping[str, Any], weights: Weights) -> tuple[float, bool]:
    """Parameters that are gathered at once, and whether all of them stay gathered.

    An engine without an optimizer allocates nothing else, not even a bucket for gradients.
    """
    most = float(zero.get("stage3_max_live_parameters", 1e9))
    reuse = float(zero.get("stage3_max_reuse_distance", 1e9))
    if weights.total <= min(most, reuse):
        return float(weights.total), True
    ahead = float(zero.get("stage3_prefetch_bucket_size", PREFETCHED))
    return min(float(weights.total), max(most, weights.largest) + ahead), False


def _staged(offload: Mapping[str, Any]) -> float:
    """Numbers in the pinned buffers through which a rank's shards go to NVMe and back."""
    return float(
        offload.get("buffer_count", BUFFER_COUNT) * offload.get("buffer_size", BUFFER_SIZE)
    )


def _quantised(kind: str, weights: Weights, size: float) -> float:
    rest = size * (weights.total - weights.in_blocks)
    if kind == "int8":
        return rest + weights.in_blocks + INT8_ROW * weights.rows_in_blocks
    return rest + weights.in_blocks * (0.5 + NF4_BLOCK / BLOCK)
