"""Sources of frozen weights: tensors by name, read by flat range.

Ranks of a sharded backbone read their own range of each tensor; no rank has to hold a whole one.
"""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhr_scale.backbone.shards import INDEX as SAFETENSORS_INDEX
from mhr_scale.backbone.shards import first_cut
from mhr_scale.errors import BackboneError, first_line
from mhr_scale.run.files import read_object
from mhr_scale.run.runlog import log
from mhr_scale.seeds import seed_from

AGAIN = "fetch it again"
BOTH = "fetch both again"
SAVE = "save its state_dict as safetensors"
#: Bytes of a file above which reading it into memory as a whole deserves a warning.
LARGE = 10**9


class WeightSource(Protocol):
    """Tensors by name, read by flat range so that a rank never holds more than its shard."""

    def names(self) -> frozenset[str]:
        """Names in the checkpoint."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def file(self, name: str) -> Path | None:
        """The file that holds a tensor; None if there is no file."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""


class SafetensorsSource:
    """Safetensors files; reading a range touches only the rows that contain it."""

    def __init__(self, files: list[Path]) -> None:
        self._handles: dict[str, tuple[Any, Path]] = {}
        for file in files:
            try:
                handle = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                fault = first_cut(file) or error
                raise BackboneError(
                    f"{file}: not a readable safetensors file ({fault}); {AGAIN}"
                ) from error
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if name in self._handles:
                    raise BackboneError(_twice(name, self._handles[name][1], file))
                self._handles[name] = (handle, file)

    def names(self) -> frozenset[str]:
        """Names in all files."""
        return frozenset(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the file's header."""
        return tuple(self._handles[name][0].get_slice(name).get_shape())

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._handles[name][1]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        shape = self.shape(name)
        width = prod(shape[1:])
        first, last = start // width, -(-stop // width)
        handle, file = self._handles[name]
        if not shape:  # a scalar
            return handle.get_tensor(name).reshape(-1)[start:stop]
        try:
            rows: Tensor = handle.get_slice(name)[first:last]
        except SafetensorError as error:
            raise BackboneError(f"{file}: {name} cannot be read ({error}); {AGAIN}") from error
        return rows.reshape(-1)[start - first * width : stop - first * width]


class PickledSource:
    """`.bin` checkpoints, read with `weights_only`; memory-mapped unless in torch's old format."""

    def __init__(self, files: list[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            mmap = zipfile.is_zipfile(file)
            if not mmap:
                _look_at_old_format(file)
            try:
                tensors = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
            except pickle.UnpicklingError as error:
                raise BackboneError(f"{file}: not a checkpoint of tensors alone; {SAVE}") from error
            except Exception as error:
                raise BackboneError(
                    f"{file}: not a readable checkpoint ({first_line(error)}); {AGAIN}"
                ) from error
            if not isinstance(tensors, dict):
                kind = type(tensors).__name__
                raise BackboneError(f"{file}: holds a {kind}, not named tensors; {SAVE}")
            others = [name for name in tensors if not isinstance(tensors[name], Tensor)]
            if others:
                raise BackboneError(f"{file}: '{others[0]}' is no tensor; {SAVE}")
            for name, tensor in tensors.items():
                if name in self._files:
                    raise BackboneError(_twice(name, self._files[name], file))
                self._tensors[name], self._files[name] = tensor, file

    def names(self) -> frozenset[str]:
        """Names in all files."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[name].shape)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self._tensors[name].reshape(-1)[start:stop]


class RandomSource:
    """Random weights by an architecture's initialisation, each a function of seed and name."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int,
        make: Callable[[str, tuple[int, ...], torch.Generator], Tensor],
    ) -> None:
        self._shapes, self._seed, self._make = shapes, seed, make
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> frozenset[str]:
        """Names of the model built from the configuration."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[name]

    def file(self, name: str) -> None:
        """No file holds it."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        if self._last is None or self._last[0] != name:
            generator = torch.Generator().manual_seed(seed_from("backbone", self._seed, name))
            self._last = (name, self._make(name, self._shapes[name], generator))
        return self._last[1].reshape(-1)[start:stop]


def read_whole(source: WeightSource, name: str) -> Tensor:
    """A tensor of a source in its own shape."""
    shape = source.shape(name)
    return source.read(name, 0, prod(shape)).reshape(shape)


def is_equal(source: WeightSource, name: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are equal, bit for bit; read in chunks."""
    shape = source.shape(name)
    if shape != source.shape(other) or len(shape) != 2:
        return False
    step = max(1, shape[1]) * 1024
    total = shape[0] * shape[1]
    return all(
        torch.equal(
            source.read(name, start, min(start + step, total)),
            source.read(other, start, min(start + step, total)),
        )
        for start in range(0, total, step)
    )


def open_weights(folder: Path) -> WeightSource:
    """The weights of a folder: safetensors where there are any, else `.bin` files.

    An index names the files to read; without one, a single unsharded file takes precedence. Raises
    `BackboneError` if files are missing, damaged, or not what the index says.
    """
    for index, single, pattern, kind in FORMATS:
        if (folder / index).is_file():
            return _open_indexed(folder / index, kind)
        files = [folder / single] if (folder / single).is_file() else sorted(folder.glob(pattern))
        if files:
            source = kind(files)
            if not source.names():
                raise BackboneError(f"{files[0]}: holds no tensor; {AGAIN}")
            return source
    raise BackboneError(f"{folder}: no *.safetensors and no pytorch_model*.bin here; fetch them")


def _open_indexed(index: Path, kind: type[SafetensorsSource | PickledSource]) -> WeightSource:
    """The files that an index names, after checking that each tensor is in the file it names."""
    places = read_index(index)
    for name, file in places.items():
        if not (index.parent / file).is_file():
            n_more = sum(other == file for other in places.values()) - 1
            raise BackboneError(
                f"{index.parent / file}: missing, and {index.name} puts {name} and {n_more} more "
                "tensors there; fetch it"
            )
    source = kind([index.parent / file for file in sorted(set(places.values()))])
    for name in sorted(source.names() | places.keys()):
        if name not in source.names():
            file_path = index.parent / places[name]
            raise BackboneError(
                f"{file_path}: {name} is missing, which {index.name} puts there; {BOTH}"
            )
        holder = source.file(name)
        if name not in places:
            raise BackboneError(f"{holder}: holds {name}, which {index.name} does not know; {BOTH}")
        if holder.name != places[name]:
            raise BackboneError(
                f"{holder}: holds {name}, which {index.name} puts in {places[name]}; {BOTH}"
            )
    return source


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index as transformers writes it.

    Raises `BackboneError` if it is not an index, or names a file outside its folder.
    """
    places = read_object(index, BackboneError).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BackboneError(
            f"{index}: no weight_map here, which names the file of each tensor; {AGAIN}"
        )
    for name, file in places.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise BackboneError(
                f"{index}: {name} is in {file!r}, which is no file beside the index; {AGAIN}"
            )
    return places


def _twice(name: str, first: Path, second: Path) -> str:
    return f"{second}: holds {name}, as {first.name} does; keep the file that belongs here"


def _look_at_old_format(file: Path) -> None:
    """Warn of a large checkpoint in torch's old format, which cannot be memory-mapped.

    Raises `BackboneError` if the file is a truncated archive, or cannot be opened.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(2)
    except OSError as error:
        raise BackboneError(f"{file}: cannot be read ({error.strerror})") from error
    if start == b"PK":
        raise BackboneError(f"{file}: not a readable checkpoint (its end is missing); {AGAIN}")
    if size > LARGE:
        log.warning(
            "%s: torch's old format cannot be memory-mapped; %.1f GB go into memory",
            file,
            size / 1e9,
        )


#: Index, unsharded file, pattern and reader of each format, the preferred one first.
FORMATS: tuple[tuple[str, str, str, type[SafetensorsSource | PickledSource]], ...] = (
    (
        SAFETENSORS_INDEX,
        "model.safetensors",
        "*.safetensors",
        SafetensorsSource,
    ),
    (
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "pytorch_model*.bin",
        PickledSource,
    ),
)
