"""Rewriting a backbone's weights: one data type, tied tensors once, as indexed safetensors.

Memory holds one chunk of a tensor at a time, or one linear that is quantised, whatever the size of
tensors, shards and backbone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mhr_scale.backbone import fingerprint, quantise
from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.backbone.manifest import Fingerprint, hash_files
from mhr_scale.backbone.merging import as_stored, plan_weights
from mhr_scale.backbone.quantised_parts import pack, plan_parts
from mhr_scale.backbone.shards import (
    ALIGNMENT,
    FileFacts,
    Weight,
    name_shard,
    plan_shards,
    write_index,
    write_shard,
)
from mhr_scale.errors import BackboneError
from mhr_scale.run.runlog import ByteProgress


def plan(blueprint: Blueprint, dtype: str) -> tuple[list[Weight], list[str]]:
    """The tensors to write, and the names in the source that the model does not use.

    No weight is read. Raises `BackboneError` if the weights do not fit their configuration.
    """
    return plan_weights(blueprint, dtype), sorted(blueprint.arrangement.unused)


#: Tensors of files, each with the weight of the model that it is a part of, and where in that it
#: begins; None for a part of what is quantised of it.
Layout = Mapping[Weight, tuple[Weight, int | None]]


def lay_out(blueprint: Blueprint, weights: Sequence[Weight], kind: str) -> Layout:
    """What the files hold of these weights: as the original's do, or quantised."""
    if kind == "none":
        return as_stored(blueprint, weights)
    with torch.device("meta"):
        linears = quantise.list_linears(make_model(blueprint), blueprint)
    laid_out: dict[Weight, tuple[Weight, int | None]] = {}
    for weight in weights:
        linear = weight.name.removesuffix(".weight")
        if linear in linears:
            parts = plan_parts(linear, weight.shape, kind)
            laid_out |= dict.fromkeys(parts, (weight, None))
        else:
            laid_out |= as_stored(blueprint, [weight])
    return laid_out


@torch.no_grad()
def write_weights(
    folder: Path,
    *,
    blueprint: Blueprint,
    weights: Layout,
    kind: str,
    max_shard_bytes: int,
) -> dict[str, FileFacts]:
    """Write shards and their index, under a progress bar; returns sizes and hashes of the files.

    Raises `BackboneError` if a number is not finite, before or after the cast.
    """
    shards = plan_shards(list(weights), max_shard_bytes)
    if kind != "none":  # what would leave others unaligned goes to the end, the widest first
        shards = [sorted(shard, key=_is_late) for shard in shards]
    progress = ByteProgress(sum(weight.n_bytes for weight in weights), what="convert")
    reader = _Reader(blueprint, weights, kind)
    facts: dict[str, FileFacts] = {}
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = name_shard(number, len(shards))
        facts[file] = write_shard(folder / file, shard, reader.read, advance=progress.add)
        places |= dict.fromkeys((weight.name for weight in shard), file)
    progress.close()
    write_index(folder, list(weights), places)
    return facts


class _Reader:
    """Reads what is written: weights, cast to their data type, and parts of quantised ones.

    It holds the parts of one linear, and those that are written later.
    """

    def __init__(self, blueprint: Blueprint, weights: Layout, kind: str) -> None:
        self._blueprint, self._weights, self._kind = blueprint, weights, kind
        self._packed: dict[str, Tensor] = {}

    def read(self, part: Weight, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor; raises `BackboneError` for odd numbers."""
        weight, first = self._weights[part]
        if first is not None:
            return self._cast(weight, first + start, first + stop)
        if part.name not in self._packed:
            self._pack(weight)
        return self._packed[part.name].reshape(-1)[start:stop]

    def _cast(self, weight: Weight, start: int, stop: int) -> Tensor:
        stored = self._blueprint.source.read(weight.name, start, stop)
        cast = stored.to(weight.dtype)
        if not all(map(torch.isfinite, cast.aminmax())):  # which are NaN if any number is
            raise _not_finite(self._blueprint, weight, start, stored, cast)
        return cast

    def _pack(self, weight: Weight) -> None:
        linear = weight.name.removesuffix("weight")
        parts = pack(self._cast(weight, 0, weight.numel).reshape(weight.shape), self._kind)
        if self._kind == "int8" and not torch.isfinite(parts["SCB"]).all():
            raise BackboneError(
                f"{self._blueprint.source.file(weight.name)}: {weight.name} has numbers that "
                "float16 cannot hold, which int8 is rounded from; set quantise: nf4"
            )
        late = {name: part for name, part in self._packed.items() if part.nbytes % ALIGNMENT}
        self._packed = {**late, **{linear + name: part for name, part in parts.items()}}


def _is_late(part: Weight) -> tuple[bool, int]:
    """Whether a tensor of this size would leave the next one unaligned, and how wide it is not."""
    return part.n_bytes % ALIGNMENT != 0, -part.dtype.itemsize


def _not_finite(
    blueprint: Blueprint, weight: Weight, start: int, stored: Tensor, cast: Tensor
) -> BackboneError:
    place = int((~torch.isfinite(cast)).nonzero()[0])
    value = float(stored[place])
    dtype = str(weight.dtype).removeprefix("torch.")
    is_cut = bool(torch.isfinite(stored[place]))
    fault = f"which {dtype} cannot hold" if is_cut else "which is no weight"
    way_out = "set dtype: float32" if is_cut and dtype != "float32" else "fetch it again"
    return BackboneError(
        f"{blueprint.source.file(weight.name)}: element {start + place} of {weight.name} is "
        f"{value:g}, {fault}; {way_out}"
    )


def hash_companions(folder: Path, known: dict[str, FileFacts]) -> dict[str, FileFacts]:
    """Sizes and hashes of all files of a folder; those in `known` are not read again."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.name not in known}
    return {**known, **hash_files(files, what="hash")}


def check_answer(stored: Fingerprint, computed: Fingerprint, *, what: str) -> float:
    """The difference of two float32 fingerprints; raises `BackboneError` beyond rounding errors."""
    measured = fingerprint.difference(stored, computed)
    limit = fingerprint.TOLERANCES["float32"]
    if measured > limit:
        raise BackboneError(
            f"the logits of {what} differ by {measured:.2g} of their spread, more than {limit:g}"
        )
    return measured
