"""Another source by the names of a model: tensors renamed, laid side by side, or left out."""

from collections.abc import Iterator
from functools import reduce
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mhr_scale.backbone.weights import WeightSource
from mhr_scale.errors import BackboneError
from mhr_scale.families.stored_names import Arrangement


class ArrangedSource:
    """A source whose tensors are those of another one, in the arrangement of a family.

    Of a tensor that lies in several parts, such as experts that are stored apart, a range is read
    of those parts that it lies in.
    """

    def __init__(self, source: WeightSource, arrangement: Arrangement) -> None:
        """Raises `BackboneError` if parts of one tensor do not fit together."""
        self._source, self._stored = source, arrangement.stored
        parts = {part for stored in arrangement.stored.values() for part in stored.names}
        self._names = (source.names() - parts - arrangement.unused) | self._stored.keys()
        self._shapes = {name: self._shape_of(name) for name in self._stored}

    def _parts(self, name: str) -> tuple[str, ...]:
        return self._stored[name].names if name in self._stored else (name,)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        parts, count = self._stored[name]
        shapes = [self._source.shape(part) for part in parts]
        if len(parts) == 1 and count is None:
            return shapes[0]
        n = len(parts) // (count or 1)
        for number, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            if shape != shapes[number % n] or shape[1:] != shapes[0][1:]:
                raise BackboneError(
                    f"{self._source.file(part)}: {part} is {list(shape)}, and {parts[0]}, which "
                    f"lies with it in {name}, is {list(shapes[0])}; fetch it again"
                )
        joined = (sum(shape[0] for shape in shapes[:n]), *shapes[0][1:])
        return joined if count is None else (count, *joined)

    def parts(self, name: str) -> dict[str, tuple[int, ...]]:
        """The tensors of the files that one tensor lies in, one after the other, and their shapes.

        By their names there; a tensor in one piece has the shape that the model has.
        """
        parts = self._parts(name)
        if len(parts) == 1:
            return {parts[0]: self.shape(name)}
        return {part: self._source.shape(part) for part in parts}

    def names(self) -> frozenset[str]:
        """Names of the model, and those in the source that it does not know."""
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[name] if name in self._shapes else self._source.shape(name)

    def file(self, name: str) -> Path | None:
        """The file that holds a tensor, or its first part; None if there is no file."""
        return self._source.file(self._parts(name)[0])

    def dtype(self, name: str) -> torch.dtype:
        """Data type of one tensor; of parts in several the one that holds them all."""
        return reduce(torch.promote_types, map(self._source.dtype, self._parts(name)))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, a copy where it lies in several parts."""
        pieces = list(self._pieces(name, start, stop))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _pieces(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        parts, dtype = self._parts(name), self.dtype(name)
        sizes = [prod(self._source.shape(part)) for part in parts]
        borders = pairwise(accumulate(sizes, initial=0))
        for part, (begin, end) in zip(parts, borders, strict=True):
            first, last = max(start, begin), min(stop, end)
            if first < last or len(parts) == 1:
                yield self._source.read(part, first - begin, last - begin).to(dtype)

    def view(self, name: str) -> Tensor | None:
        """The tensor as it lies in its mapped file; None if it lies in parts."""
        parts = self._parts(name)
        view = self._source.view(parts[0]) if len(parts) == 1 else None
        return None if view is None else view.reshape(self.shape(name))

    def views(self, name: str) -> dict[str, Tensor]:
        """What the files hold of a tensor, by its names there."""
        views = (self._source.views(part) for part in self._parts(name))
        return {stored: view for found in views for stored, view in found.items()}
