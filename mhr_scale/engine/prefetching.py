"""Mapped weights are read ahead, one block before a pass needs them.

Where memory does not hold all of a backbone, the system drops pages of its files, and reads them
again when they are touched: a pass would wait for the disk at every weight. Blocks are used in one
order forward and in the opposite one backward, so what was used last is there at the turn.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.backbone.mapped_file import read_ahead
from mhr_scale.families.family import Family


def read_blocks_ahead(model: Any, family: Family) -> None:
    """Let each block of a model, and its head, begin to read the weights of the one after it."""
    stacks = family.blocks(model.config).values()
    parts = [model.get_submodule(name) for stack in stacks for name in stack.list_modules()]
    head = model.get_output_embeddings()
    order = _Order([*parts, head] if head is not None else parts)
    for number, part in enumerate(order.parts):
        part.register_forward_pre_hook(order.on_enter(number))
        part.register_forward_hook(order.on_leave(number))


class _Order:
    """The parts of a model in the order of a forward pass, and which of them is on its way."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        self._ahead = -1

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
        following = number + direction
        if following == len(self.parts):  # backward turns here; without gradients, it starts again
            following = number if torch.is_grad_enabled() else 0
        for wanted in dict.fromkeys((number, following)):
            if wanted >= 0 and wanted != self._ahead:
                for weight in self.parts[wanted].parameters():
                    read_ahead(weight.data)
        self._ahead = following
