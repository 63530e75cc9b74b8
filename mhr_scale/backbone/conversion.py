"""Rewriting a backbone's weights: one data type, tied tensors once, as indexed safetensors.

Memory holds one chunk of a tensor at a time, whatever the size of tensors, shards and backbone.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mhr_scale.backbone import fingerprint
from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.manifest import Fingerprint, hash_files
from mhr_scale.backbone.merging import plan_weights
from mhr_scale.backbone.shards import (
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
    weights = plan_weights(blueprint, dtype)
    written = {weight.name for weight in weights}
    return weights, sorted(blueprint.source.names() - written - blueprint.ties.keys())


@torch.no_grad()
def write_weights(
    folder: Path, *, blueprint: Blueprint, weights: Sequence[Weight], max_shard_bytes: int
) -> dict[str, FileFacts]:
    """Write shards and their index, under a progress bar; returns sizes and hashes of the files.

    Raises `BackboneError` if a number is not finite, before or after the cast.
    """
    shards = plan_shards(weights, max_shard_bytes)
    progress = ByteProgress(sum(weight.n_bytes for weight in weights), what="convert")

    def read(weight: Weight, start: int, stop: int) -> Tensor:
        stored = blueprint.source.read(weight.name, start, stop)
        cast = stored.to(weight.dtype)
        # a sum is finite only if its terms are; float64 leaves room for all sums of finite terms
        if not torch.isfinite(cast.sum(dtype=torch.float64)):
            raise _not_finite(blueprint, weight, start, stored, cast)
        return cast

    facts: dict[str, FileFacts] = {}
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = name_shard(number, len(shards))
        facts[file] = write_shard(folder / file, shard, read, advance=progress.add)
        places |= dict.fromkeys((weight.name for weight in shard), file)
    progress.close()
    write_index(folder, weights, places)
    return facts


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
