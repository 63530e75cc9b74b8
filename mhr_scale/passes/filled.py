"""What is in use while some rows are passed through the model: their slots, and how they lie."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.slots import Slots
from mhr_scale.families.packed import Packed


@contextmanager
def filled(
    adapter: Adapter,
    packed: Packed,
    *,
    seeds: Sequence[int] | None = None,
    uniform_share: float = 0.0,
) -> Iterator[Slots]:
    """The block of the forward and backward pass of packed rows, under their tasks' slots."""
    slots = adapter.slots(
        packed.tasks, tokens=packed.streams, seeds=seeds, uniform_share=uniform_share
    )
    with packed.in_use(), slots:
        yield slots
