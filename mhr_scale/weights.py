"""Sources of frozen weights: tensors by name, read by flat range.

Ranks of a sharded backbone ask for their own range of each tensor; nobody has to hold the whole.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhr_scale.errors import BackboneError, first_line
from mhr_scale.seeds import seed_from


class WeightSource(Protocol):
    """Tensors by name, read by flat range so that nobody has to hold more than their part."""

    def names(self) -> frozenset[str]:
        """Names in the checkpoint; empty where every name can be made (random weights)."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""


class SafetensorsSource:
    """Safetensors files; a range read touches only the rows that hold it."""

    def __init__(self, files: list[Path]) -> None:
        self._handles: dict[str, tuple[Any, Path]] = {}
        for file in files:
            try:
                handle = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise BackboneError(f"{file}: not a readable safetensors file ({error})") from error
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                self._handles[name] = (handle, file)

    def names(self) -> frozenset[str]:
        """Names in all files."""
        return frozenset(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the file's header."""
        return tuple(self._handles[name][0].get_slice(name).get_shape())

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        shape = self.shape(name)
        width = 1
        for size in shape[1:]:
            width *= size
        first, last = start // width, -(-stop // width)
        handle, file = self._handles[name]
        try:
            rows: Tensor = handle.get_slice(name)[first:last]
        except SafetensorError as error:
            raise BackboneError(f"{file}: cannot read {name} ({error})") from error
        return rows.reshape(-1)[start - first * width : stop - first * width]


class PickledSource:
    """`.bin` checkpoints, read with `weights_only`; memory-mapped unless in torch's old format."""

    def __init__(self, files: list[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                mmap = zipfile.is_zipfile(file)
                tensors = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
            except pickle.UnpicklingError as error:
                raise BackboneError(f"{file}: not a checkpoint of tensors alone") from error
            except Exception as error:
                raise BackboneError(
                    f"{file}: not a readable checkpoint ({first_line(error)})"
                ) from error
            if not isinstance(tensors, dict):
                raise BackboneError(f"{file}: holds a {type(tensors).__name__}, not named tensors")
            strange = [name for name in tensors if not isinstance(tensors[name], Tensor)]
            if strange:
                raise BackboneError(f"{file}: '{strange[0]}' is no tensor")
            self._tensors.update(tensors)

    def names(self) -> frozenset[str]:
        """Names in all files."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self._tensors[name].reshape(-1)[start:stop]


class RandomSource:
    """Random weights by T5's own rules, each tensor a function of the seed and its name alone."""

    def __init__(self, config: Any, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._config, self._shapes, self._seed = config, shapes, seed
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> frozenset[str]:
        """Names of the model built from the configuration."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        if self._last is None or self._last[0] != name:
            self._last = (name, self._make(name))
        return self._last[1].reshape(-1)[start:stop]

    def _make(self, name: str) -> Tensor:
        c, factor = self._config, self._config.initializer_factor
        tensor = torch.empty(self._shapes[name])
        if "layer_norm" in name:
            return tensor.fill_(factor)
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        std = {
            "shared": 1.0,
            "lm_head": 1.0,
            "q": (c.d_model * c.d_kv) ** -0.5,
            "o": (c.num_heads * c.d_kv) ** -0.5,
            "wo": c.d_ff**-0.5,
        }.get(last, c.d_model**-0.5)
        generator = torch.Generator().manual_seed(seed_from("backbone", self._seed, name))
        return tensor.normal_(0.0, factor * std, generator=generator)


def open_weights(folder: Path) -> WeightSource:
    """The weights of a folder: safetensors where there are any, else `.bin` files."""
    for pattern, kind in (
        ("*.safetensors", SafetensorsSource),
        ("pytorch_model*.bin", PickledSource),
    ):
        files = sorted(folder.glob(pattern))
        if files:
            return kind(files)
    raise BackboneError(f"{folder}: no *.safetensors and no pytorch_model*.bin here")
