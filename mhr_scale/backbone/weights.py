"""Sources of frozen weights: tensors by name, read by flat range.

Ranks of a sharded backbone read their own range of each tensor; no rank has to hold a whole one.
"""

import pickle
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhr_scale.backbone.mapped_file import MappedFile
from mhr_scale.backbone.shards import DTYPES, PART_DTYPES, first_cut, read_header
from mhr_scale.errors import BackboneError, first_line, shortened
from mhr_scale.run.files import as_size
from mhr_scale.run.runlog import ByteProgress, log
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
        """Elements [start, stop) of the flattened tensor, perhaps a view of its file."""

    def view(self, name: str) -> Tensor | None:
        """The tensor as it lies in its mapped file; None if no file holds it."""

    def views(self, name: str) -> dict[str, Tensor]:
        """What the files hold of a tensor, by its names there."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: what safetensors calls its data type, its shape, and its numbers.

    Those are a view of the mapped file; None where the data type is none that is known.
    """

    kind: str
    shape: tuple[int, ...]
    numbers: Tensor | None


class FileSource(ABC):
    """Tensors of one or several files, each as a view of its mapped file."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read what the files say of their tensors. Raises `BackboneError` for what is wrong."""
        self._tensors: dict[str, StoredTensor] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for name, tensor in self._list(file).items():
                if name in self._files:
                    raise BackboneError(
                        f"{file}: holds {name}, as {self._files[name].name} does; keep the file "
                        "that belongs here"
                    )
                self._tensors[name], self._files[name] = tensor, file

    @abstractmethod
    def _list(self, file: Path) -> Mapping[str, StoredTensor]:
        """The tensors of one file; raises `BackboneError` if it cannot be read."""

    def names(self) -> frozenset[str]:
        """Names in all files."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._tensors[name].shape

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def dtype(self, name: str) -> torch.dtype:
        """Data type of one tensor; raises `BackboneError` if it is no float.

        Integers, or floats of 8 bits and less, would pass for weights without their scale.
        """
        kind = self._tensors[name].kind
        found = next((dtype for dtype, known in DTYPES.items() if known == kind), None)
        if found is None:
            raise BackboneError(
                f"{self._files[name]}: {name} is {kind.removeprefix('torch.')}, which is no "
                "weight's data type; use the original, not a quantised copy (backbone.quantise "
                "quantises it)"
            )
        return found

    def view(self, name: str) -> Tensor:
        """The tensor as it lies in its file."""
        numbers = self._tensors[name].numbers
        assert numbers is not None, "`dtype` comes first"
        return numbers

    def views(self, name: str) -> dict[str, Tensor]:
        """The tensor, whose name is the one in the file."""
        return {name: self.view(name)}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self.view(name).reshape(-1)[start:stop]


class SafetensorsSource(FileSource):
    """Safetensors files."""

    def _list(self, file: Path) -> dict[str, StoredTensor]:
        try:
            with safe_open(file, "np"):  # checks the header; torch's reader maps the file writable
                pass
            header, start = read_header(file)
        except (SafetensorError, OSError) as error:
            fault = first_cut(file) or error
            raise BackboneError(
                f"{file}: not a readable safetensors file ({fault}); {AGAIN}"
            ) from error
        mapped = MappedFile(file)
        dtypes = {kind: dtype for dtype, kind in (DTYPES | PART_DTYPES).items()}

        def entry(fields: Mapping[str, Any]) -> StoredTensor:
            kind, shape = fields["dtype"], tuple(fields["shape"])
            numbers = None
            if kind in dtypes:
                numbers = mapped.tensor(start + fields["data_offsets"][0], dtypes[kind], shape)
            return StoredTensor(kind, shape, numbers)

        return {name: entry(fields) for name, fields in header.items()}


class PickledSource(FileSource):
    """`.bin` checkpoints, read with `weights_only`; mapped unless in torch's old format."""

    def _list(self, file: Path) -> dict[str, StoredTensor]:
        is_mapped = _can_be_mapped(file)
        try:
            # on the meta device torch notes where a storage lies in the file, and reads none
            place = "meta" if is_mapped else "cpu"
            tensors = torch.load(file, map_location=place, weights_only=True)
        except pickle.UnpicklingError as error:
            raise BackboneError(f"{file}: not a checkpoint of tensors alone; {SAVE}") from error
        except Exception as error:
            raise BackboneError(
                f"{file}: not a readable checkpoint ({first_line(error)}); {AGAIN}"
            ) from error
        if not isinstance(tensors, dict):
            kind = type(tensors).__name__
            raise BackboneError(f"{file}: holds a {kind}, not named tensors; {SAVE}")
        mapped = MappedFile(file) if is_mapped else None
        return {name: _entry(file, name, tensor, mapped) for name, tensor in tensors.items()}


def _entry(file: Path, name: object, tensor: object, mapped: MappedFile | None) -> StoredTensor:
    """One tensor of a pickled checkpoint; raises `BackboneError` if it is no weight with a name."""
    start, fault = None, None
    if not isinstance(name, str):
        fault = f"the key {shortened(repr(name))} is no name of a tensor"
    elif not isinstance(tensor, Tensor):
        fault = f"'{name}' is a {type(tensor).__name__}, no tensor"
    elif tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        fault = f"'{name}' is a {kind} tensor, and weights are plain ones"
    elif tensor.is_meta:
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None:
            fault = f"'{name}' is a meta tensor, which has no numbers"
    if fault is not None:
        raise BackboneError(f"{file}: {fault}; {SAVE}")
    assert isinstance(tensor, Tensor)
    numbers = tensor.detach()
    if mapped is not None:
        storage = tensor.untyped_storage()
        assert start is not None
        if start + storage.nbytes() > len(mapped):
            raise BackboneError(f"{file}: '{name}' lies beyond the end of the file; {AGAIN}")
        flat = mapped.tensor(start, tensor.dtype, (storage.nbytes() // tensor.dtype.itemsize,))
        first = flat.storage_offset() + tensor.storage_offset()
        numbers = flat.as_strided(tensor.shape, tensor.stride(), first)
    kind = DTYPES.get(tensor.dtype, str(tensor.dtype))
    return StoredTensor(kind, tuple(tensor.shape), numbers)


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

    def view(self, name: str) -> None:
        """No file holds it."""

    def views(self, name: str) -> dict[str, Tensor]:
        """No file holds it."""
        return {}

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
    if shape != source.shape(other) or source.dtype(name) != source.dtype(other):
        return False
    step, total = max(1, prod(shape[1:])) * 1024, prod(shape)
    progress = ByteProgress(2 * total * source.dtype(name).itemsize, what="look for ties")

    def bits(of: str, start: int) -> Tensor:  # integers are equal at once where memory is the same
        return source.read(of, start, min(start + step, total)).contiguous().view(torch.uint8)

    def are_equal(start: int) -> bool:
        ours, theirs = bits(name, start), bits(other, start)
        progress.add(name, 2 * ours.nbytes)
        return torch.equal(ours, theirs)

    try:
        return all(map(are_equal, range(0, total, step)))
    finally:
        progress.close()


def _can_be_mapped(file: Path) -> bool:
    """Whether the tensors of a pickled checkpoint lie in it as they are in memory.

    Raises `BackboneError` if the file is a truncated archive, or cannot be opened.
    """
    if not zipfile.is_zipfile(file):
        _look_at_old_format(file)
        return False
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        byte_orders = [archive.read(r) for r in records if r.filename.endswith("/byteorder")]
    is_native = all(order.decode() == sys.byteorder for order in byte_orders)
    return is_native and all(record.compress_type == zipfile.ZIP_STORED for record in records)


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
