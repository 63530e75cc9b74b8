"""Placing the weights of a frozen backbone: used where their files are mapped, or read.

Each rank of a sharded backbone reads its own range of each tensor only.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.backbone import quantise
from mhr_scale.backbone.blueprint import Blueprint, plan_copies
from mhr_scale.backbone.quantised_parts import QuantisedSource, pack, plan_parts
from mhr_scale.backbone.weights import WeightSource, read_whole
from mhr_scale.engine import nvme
from mhr_scale.engine.host_memory import Stager
from mhr_scale.errors import EngineError
from mhr_scale.run.files import as_size
from mhr_scale.run.runlog import ByteProgress, log


def map_weights(model: nn.Module, blueprint: Blueprint, *, kind: str) -> None:
    """Let weights of a model on the meta device be views of their files, where those hold them.

    A view takes no memory but the system's cache of the file, which all processes of a machine
    share. Weights of another data type than the model's, and linears of `kind`, stay on the meta
    device.
    """
    quantised = {} if kind == "none" else quantise.list_linears(model, blueprint)
    for name, parameter in plan_copies(model, blueprint).items():
        place, _, last = name.rpartition(".")
        view = blueprint.source.view(name)
        if place in quantised or view is None:
            continue
        if view.dtype == parameter.dtype and view.is_contiguous():
            weight = nn.Parameter(view, requires_grad=False)
            model.get_submodule(place).register_parameter(last, weight)


@torch.no_grad()
def fill(
    model: nn.Module,
    blueprint: Blueprint,
    *,
    kind: str,
    rank: int | None,
    device: torch.device,
    mapped: bool = False,
) -> None:
    """Load every weight of a blueprint that is not mapped into the model, under a progress bar.

    `rank` is this process's rank among those that a ZeRO-3 model is sharded over, None for a
    replicated model. Linears of the latter that are on the meta device become ones of `kind`: of
    the parts that their files hold, which are used there if `mapped`, or quantised now.
    """
    copies, source = plan_copies(model, blueprint), blueprint.source
    sizes = {name: _held_bytes(parameter, rank, kind) for name, parameter in copies.items()}
    views = {
        name
        for name, parameter in copies.items()
        if rank is None and _is_mapped(parameter, source, name, mapped=mapped)
    }
    total = sum(size for name, size in sizes.items() if name not in views)
    progress, stager = ByteProgress(total, what="read backbone"), Stager(device)
    for name, parameter in copies.items():
        if rank is not None:
            with nvme.in_memory(parameter):
                _fill_shards(name, parameter, source, rank=rank)
        elif parameter.is_meta:
            if isinstance(source, QuantisedSource):
                parts = source.parts(name)
                if name not in views:
                    parts = {part: stager.place(tensor) for part, tensor in parts.items()}
            else:
                parts = pack(read_whole(source, name).to(parameter.dtype).to(device), kind)
            quantise.put(model, name, parts, kind)
        elif name not in views:
            stager.copy(parameter.data, read_whole(source, name))
        if name not in views:
            progress.add(name, sizes[name])
    progress.close()
    _say(
        n_mapped=sum(sizes[name] for name in views),
        n_read=total if copies.keys() - views else None,
        kind=kind,
        rank=rank,
    )


def _is_mapped(parameter: Any, source: WeightSource, name: str, *, mapped: bool) -> bool:
    """Whether a weight is used where its file is mapped; quantised ones will be, if `mapped`."""
    if parameter.is_meta:
        return mapped and isinstance(source, QuantisedSource)
    view = source.view(name)
    return view is not None and bool(parameter.data_ptr() == view.data_ptr())


def _say(*, n_mapped: int, n_read: int | None, kind: str, rank: int | None) -> None:
    """Tell how many bytes this process reads and holds, and how many it shares."""
    told = []
    if n_mapped:
        told.append(f"{as_size(n_mapped)} mapped, which this machine holds once in its file cache")
    if n_read is not None:
        what = "shards" if rank is not None else "weights" if kind == "none" else f"{kind} weights"
        told.append(f"{as_size(n_read)} of {what} of this process's own")
    log.info("backbone: %s", ", ".join(told))


def _fill_shards(name: str, parameter: Any, source: WeightSource, *, rank: int) -> None:
    for shard, number in shards_of(parameter, rank):
        start, stop = share(number, shard.numel(), whole=parameter.ds_numel)
        shard.zero_()
        if stop > start:
            shard[: stop - start].copy_(source.read(name, start, stop))


def _held_bytes(parameter: Any, rank: int | None, kind: str) -> int:
    """Bytes of a parameter that a rank holds, in memory or on NVMe; if on `meta`, as `kind`."""
    if rank is None and parameter.is_meta:
        return sum(part.n_bytes for part in plan_parts("", tuple(parameter.shape), kind))
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
