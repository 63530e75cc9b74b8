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

from mhr_scale.backbone.shards import DTYPES, first_cut
from mhr_scale.errors import BackboneError, first_line, shortened
from mhr_scale.run.files import as_size
from mhr_scale.run.runlog import log
from mhr_scale.seeds import seed_from

AGAIN = "fetch it again"
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

    def dtype(self, name: str) -> torch.dtype:
        """Data type of one tensor; no number is read. Raises `BackboneError` unless a float."""

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

    def dtype(self, name: str) -> torch.dtype:
        """Data type of one tensor, from the file's header."""
        handle, file = self._handles[name]
        return _type_of_weight(handle.get_slice(name).get_dtype(), name, file)

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
            for name, tensor in tensors.items():
                fault = _fault_of(name, tensor)
                if fault is not None:
                    raise BackboneError(f"{file}: {fault}; {SAVE}")
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

    def dtype(self, name: str) -> torch.dtype:
        """Data type of one tensor."""
        dtype = self._tensors[name].dtype
        return _type_of_weight(DTYPES.get(dtype, str(dtype)), name, self._files[name])

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

    def dtype(self, name: str) -> torch.dtype:
        """They are made in float32."""
        return torch.float32

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        if self._last is None or self._last[0] != name:
            generator = torch.Generator().manual_seed(seed_from("backbone", self._seed, name))
            self._last = (name, self._make(name, self._shapes[name], generator))
        return self._last[1].reshape(-1)[start:stop]


class RenamedSource:
    """Another source, of which some tensors go by other names: those of the model."""

    def __init__(self, source: WeightSource, stored: Mapping[str, str]) -> None:
        """`stored` maps a name to the one that the source has for it."""
        self._source, self._stored = source, stored

    def names(self) -> frozenset[str]:
        """Names in the source, the renamed ones by their new name."""
        return (self._source.names() - set(self._stored.values())) | self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._source.shape(self._stored.get(name, name))

    def file(self, name: str) -> Path | None:
        """The file that holds a tensor; None if there is no file."""
        return self._source.file(self._stored.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        """Data type of one tensor."""
        return self._source.dtype(self._stored.get(name, name))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self._source.read(self._stored.get(name, name), start, stop)


def read_whole(source: WeightSource, name: str) -> Tensor:
    """A tensor of a source in its own shape."""
    shape = source.shape(name)
    return source.read(name, 0, prod(shape)).reshape(shape)


def is_equal(source: WeightSource, name: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are equal, bit for bit; read in chunks."""
    shape = source.shape(name)
    if shape != source.shape(other) or source.dtype(name) != source.dtype(other):
        return False
    step, total = max(1, prod(shape[1:])) * 1024, prod(shape)

    def bits(of: str, start: int) -> Tensor:  # integers are equal at once where memory is the same
        return source.read(of, start, min(start + step, total)).contiguous().view(torch.uint8)

    return all(torch.equal(bits(name, at), bits(other, at)) for at in range(0, total, step))


def _type_of_weight(kind: str, name: str, file: Path) -> torch.dtype:
    """The data type by what safetensors calls it; raises `BackboneError` if it is no float.

    Integers, or floats of 8 bits and less, would pass for weights without their scale.
    """
    found = next((dtype for dtype, known in DTYPES.items() if known == kind), None)
    if found is None:
        raise BackboneError(
            f"{file}: {name} is {kind.removeprefix('torch.')}, which is no weight's data type; use "
            "the original, not a quantised copy (backbone.quantise quantises it)"
        )
    return found


def _fault_of(name: object, tensor: object) -> str | None:
    """Why an entry of a pickled checkpoint is no weight with a name; None if it is one."""
    if not isinstance(name, str):
        return f"the key {shortened(repr(name))} is no name of a tensor"
    if not isinstance(tensor, Tensor):
        return f"'{name}' is a {type(tensor).__name__}, no tensor"
    if tensor.is_meta:
        return f"'{name}' is a meta tensor, which has no numbers"
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        return f"'{name}' is a {kind} tensor, and weights are plain ones"
    return None


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
            "%s: torch's old format cannot be memory-mapped; %s go into memory",
            file,
            as_size(size),
        )
