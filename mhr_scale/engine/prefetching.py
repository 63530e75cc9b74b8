"""Mapped weights are read ahead, one block before a pass needs them, and dropped block by block.

Where memory does not hold all of a backbone, the system would drop single pages here and there, and
read them again one by one: a pass over T0-11B on 24 GiB then takes minutes. So some blocks, spread
over the model, are given back as a whole once they are used, and read again as a whole while those
between them compute; all others stay.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.backbone.mapped_file import is_mapped, read_ahead, release
from mhr_scale.families.family import Family

#: Share of a machine's memory that weights leave free beside what its processes take.
SPARE = 0.02
#: Bytes of mapped weights below which none of this is worth its time: a third of a small pass.
LEAST = 1 << 30
#: Weights that stay are counted in such shares of all, so that the ranks of a machine agree.
SHARES = 16


def read_blocks_ahead(model: Any, family: Family) -> None:
    """Let each block of a model, and its head, begin to read the weights of the one after it.

    Small models are left as they are: memory holds them.
    """
    stacks = family.blocks(model.config).values()
    parts = [model.get_submodule(name) for stack in stacks for name in stack.list_modules()]
    head = model.get_output_embeddings()
    order = _Order([*parts, head] if head is not None else parts)
    if order.n_bytes < LEAST:
        return
    for number, part in enumerate(order.parts):
        part.register_forward_pre_hook(order.on_enter(number))
        part.register_forward_hook(order.on_leave(number))


class _Order:
    """The parts of a model in the order of a forward pass; which one is used, which is to come."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts = parts
        self._views = [
            [(weight, weight.data) for weight in part.parameters() if is_mapped(weight.data)]
            for part in parts
        ]
        self._sizes = [sum(view.nbytes for _, view in views) for views in self._views]
        self._dropped: frozenset[int] = frozenset()
        self._n_kept, self._least_room = self.n_bytes, math.inf
        self._used, self._ahead = -1, -1

    @property
    def n_bytes(self) -> int:
        """Bytes of all mapped weights of the parts."""
        return sum(self._sizes)

    def on_enter(self, number: int) -> Any:
        """The hook of a part that is about to run, perhaps to recompute what backward needs."""

        def enter(module: nn.Module, inputs: Any) -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            self._use(number, -1 if in_backward else 1)

        return enter

    def on_leave(self, number: int) -> Any:
        """The hook of a part that has run: its backward pass will be noticed."""

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            if isinstance(first, Tensor) and first.grad_fn is not None:
                first.grad_fn.register_prehook(lambda gradients: self._use(number, -1))

        return leave

    def _use(self, number: int, direction: int) -> None:
        """Drop the part used before, if it is one that is dropped, and ask for the next one."""
        following = number + direction
        if following == len(self.parts):  # backward turns here; without gradients, it starts again
            following = number if torch.is_grad_enabled() else 0
        dropped = self._choose(is_new_pass=number == 0 and direction == 1)
        for part in dropped - {number, following}:
            for view in self._present(part):
                release(view)
        self._used = number
        for wanted in dict.fromkeys((number, following)):
            if wanted >= 0 and wanted != self._ahead:
                read_ahead(self._present(wanted))
        self._ahead = following

    def _present(self, number: int) -> list[Tensor]:
        """The views of a part that are in use: training of weights puts copies in their place."""
        return [
            view for weight, view in self._views[number] if weight.data_ptr() == view.data_ptr()
        ]

    def _choose(self, *, is_new_pass: bool) -> frozenset[int]:
        """Choose the parts that do not stay, and return those that are to be dropped now.

        A pass begins with as many as had no room at its predecessor's worst moment; where it is
        short of room itself, more of them go.
        """
        room = room_for_weights() - 2.0 * max(self._sizes)  # a part in use, and the next one
        self._least_room = min(self._least_room, room)
        chosen = self._dropped
        if is_new_pass:
            chosen, self._least_room = choose_dropped(self._sizes, self._least_room), math.inf
        elif room < self._n_kept:
            chosen |= choose_dropped(self._sizes, room)
        new, self._dropped = chosen - self._dropped, chosen
        self._n_kept = sum(s for number, s in enumerate(self._sizes) if number not in chosen)
        used = {self._used} & chosen
        return frozenset(new | used)


def room_for_weights() -> float:
    """Bytes of mapped files that this machine's memory holds beside its processes."""
    import psutil

    memory = psutil.virtual_memory()
    return float(memory.available - SPARE * memory.total)


def choose_dropped(sizes: Sequence[int], room: float) -> frozenset[int]:
    """Which parts do not stay where there is `room` for some, spread evenly over all of them."""
    total = sum(sizes)
    if room >= total:
        return frozenset()
    share = 1.0 - max(0, int(SHARES * room / total)) / SHARES
    dropped, due = set(), 0.0
    for number, size in enumerate(sizes):
        due += share * size
        if due >= size / 2:
            dropped.add(number)
            due -= size
    return frozenset(dropped)
