"""Safetensors files: written chunk by chunk, and diagnosed if truncated.

A file is the length of its header (8 bytes, little-endian), the header (JSON: data type, shape and
offsets of every tensor), and the tensors' bytes one after the other without a gap.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhr_scale.run.files import named, write_json
from mhr_scale.run.folders import check_room

#: Data types by their names in a header.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
#: Data types of the parts of quantised weights: integers, which are no weights by themselves.
PART_DTYPES = {torch.int8: "I8", torch.uint8: "U8"}
#: The first tensor begins at a multiple of this: a cache line, as allocated tensors do.
ALIGNMENT = 64
#: Longest header that the library reads, in bytes.
LONGEST_HEADER = 100_000_000
METADATA = "__metadata__"
INDEX = "model.safetensors.index.json"
#: Elements that are in memory at a time while a file is written.
CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One tensor of a file: its name, shape and data type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return self.numel * self.dtype.itemsize


def plan_shards(weights: Sequence[Weight], max_bytes: int) -> list[list[Weight]]:
    """Weights in order, split into files of `max_bytes` at most; a larger tensor has its own."""
    shards: list[list[Weight]] = []
    size = 0
    for weight in weights:
        if not shards or size + weight.n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.n_bytes
    return shards


def name_shard(number: int, n_shards: int) -> str:
    """The name of one of several files, counted from 1, as transformers names them."""
    return f"model-{number:05d}-of-{n_shards:05d}.safetensors"


def write_index(folder: Path, weights: Sequence[Weight], places: Mapping[str, str]) -> None:
    """Write the index, which names the file of each weight, as transformers reads it."""
    size = sum(weight.n_bytes for weight in weights)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(places)})


def check_free_space(folder: Path, weights: Sequence[Weight], *, what: str) -> None:
    """Raise `RunError` if the disk below `folder` has no room for the weights."""
    check_room(folder, sum(weight.n_bytes for weight in weights), what=what)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """Size in bytes and sha256 of a file."""

    bytes: int
    sha256: str


def write_shard(
    file: Path,
    weights: Sequence[Weight],
    read: Callable[[Weight, int, int], Tensor],
    *,
    advance: Callable[[str, int], None],
) -> FileFacts:
    """Write a safetensors file, flushed to disk, of which one chunk is in memory at a time.

    `read` returns elements [start, stop) of a flattened tensor; `advance` is called with the tensor
    and the bytes of every chunk. Weights of several data types have to come widest first.
    """
    digest, size = hashlib.sha256(), 0
    with named(file), file.open("wb") as out:

        def put(data: Any) -> None:
            nonlocal size
            digest.update(data)
            size += out.write(data)

        put(_header(weights))
        for weight in weights:
            for start in range(0, weight.numel, CHUNK):
                chunk = read(weight, start, min(start + CHUNK, weight.numel))
                assert chunk.dtype == weight.dtype
                put(chunk.contiguous().view(torch.uint8).numpy().data)
                advance(weight.name, chunk.nbytes)
        out.flush()
        os.fsync(out.fileno())
    return FileFacts(bytes=size, sha256=digest.hexdigest())


def _header(weights: Sequence[Weight]) -> bytes:
    """The bytes of a file before its first tensor."""
    table: dict[str, Any] = {METADATA: {"format": "pt"}}
    start = 0
    for weight in weights:
        table[weight.name] = {
            "dtype": (DTYPES | PART_DTYPES)[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, start + weight.n_bytes],
        }
        start += weight.n_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The table of a readable file, without its metadata, and where the first tensor begins."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        table = json.loads(stream.read(length))
    table.pop(METADATA, None)
    return table, 8 + length


def first_cut(file: Path) -> str | None:
    """Where a truncated safetensors file ends; None if it is not truncated."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > LONGEST_HEADER:
                return None
            if size < 8 + length:
                return f"it ends in its header, after {size} of {8 + length} bytes"
            table = json.loads(stream.read(length))
        places = [(*map(int, v["data_offsets"]), k) for k, v in table.items() if k != METADATA]
        places = [(start, stop, name) for start, stop, name in places]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    for start, stop, name in sorted(places):
        if 8 + length + stop > size:
            present = max(0, size - 8 - length - start)
            return f"it ends in {name}, of which {present} of {stop - start} bytes are there"
    return None
