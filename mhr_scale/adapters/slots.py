"""Filling slots: the only place where skills are mixed, once per step and shape.

Shape letters: U slots, N linears of one shape, Q splits, S skills, R rank, I and O features of one
split. K inventories: 1 that all slots share, or U, one per slot.

Layers never see the mixing graph. They get ready pairs as detached leaves, one pair per linear;
after the backward pass the leaves' gradients are stacked per shape and pushed once through the
mixing graph ("the cut"). Activation recomputation, accumulation and sharding hooks therefore meet
plain LoRA, whatever the method.
"""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mhr_scale.adapters.linear import MASK_WIDTH, LowRankSlots, RowMap, ScalingSlots
from mhr_scale.errors import AdapterError

if TYPE_CHECKING:
    from mhr_scale.adapters.methods import Adapter


def mix_pairs(
    a_NKQSIR: Tensor, b_NKQSRO: Tensor, w_UNQS: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Mix the skills of N linears for U slots: A^q = sum_s w_qs A_qs, B^q likewise.

    Returns A (N, U, Q * I, R), the splits side by side along the input, and scale * B
    (N, U, R, Q * O), side by side along the output (method notes 1.4). Without weights the slots
    are single skills as they stand (LoRA).
    """
    if w_UNQS is None:
        return a_NKQSIR[:, :, 0, 0], b_NKQSRO[:, :, 0, 0] * scale
    w_NUQS = w_UNQS.transpose(0, 1)
    if a_NKQSIR.shape[1] == 1:
        a_NUQIR = torch.einsum("nuqs,nqsir->nuqir", w_NUQS, a_NKQSIR[:, 0])
        b_NURQO = torch.einsum("nuqs,nqsro->nurqo", w_NUQS * scale, b_NKQSRO[:, 0])
    else:
        a_NUQIR = torch.einsum("nuqs,nuqsir->nuqir", w_NUQS, a_NKQSIR)
        b_NURQO = torch.einsum("nuqs,nuqsro->nurqo", w_NUQS * scale, b_NKQSRO)
    return a_NUQIR.flatten(2, 3), b_NURQO.flatten(3, 4)


def mix_vectors(l_NKQSO: Tensor, w_UNQS: Tensor | None) -> Tensor:
    """Mix (IA)3 vectors: l = concat_q sum_s w_qs l_qs, (N, U, Q * O)."""
    if w_UNQS is None:
        return l_NKQSO[:, :, 0, 0]
    w_NUQS = w_UNQS.transpose(0, 1)
    if l_NKQSO.shape[1] == 1:
        return torch.einsum("nuqs,nqso->nuqo", w_NUQS, l_NKQSO[:, 0]).flatten(2, 3)
    return torch.einsum("nuqs,nuqso->nuqo", w_NUQS, l_NKQSO).flatten(2, 3)


class Slots(AbstractContextManager["Slots"]):
    """The filled slots of one step. Inside the `with` block the model uses them.

    The backward pass belongs inside the block too, through `backward`.
    """

    def __init__(self, adapter: "Adapter", rows: RowMap, mixed: list[tuple[Tensor, ...]]) -> None:
        self._adapter = adapter
        self._rows = rows
        self._mixed = mixed
        self._leaves: list[list[tuple[Tensor, ...]]] = []
        self._row_leaf: tuple[Tensor, tuple[int, ...]] | None = None

    def watch_rows(self, leaf_UGQS: Tensor, task_ids: tuple[int, ...]) -> None:
        """Remember the leaf copy of the routing rows in use, whose gradient `backward` delivers."""
        self._row_leaf = (leaf_UGQS, task_ids)

    def __enter__(self) -> "Slots":
        adapter, rows = self._adapter, self._rows
        adapter.check_idle()
        mask: Tensor | None = None
        index: Tensor | None = None
        if rows.n_slots > 1 and not rows.is_even:
            first = self._mixed[0][0]
            if adapter.config.kind == "ia3":
                index = torch.tensor(rows.slot_of_row, device=first.device)
            elif rows.n_slots * adapter.config.rank <= MASK_WIDTH:
                mask = rows.mask(first)
        for stack, sides in zip(adapter.inventory.stacks, self._mixed, strict=True):
            leaves = [
                tuple(
                    part.detach().requires_grad_(side.requires_grad)
                    for part, side in zip(parts, sides, strict=True)
                )
                for parts in zip(*(side.unbind(0) for side in sides), strict=True)
            ]
            self._leaves.append(leaves)
            for member, leaf in zip(stack.members, leaves, strict=True):
                adapter.linears[member].slots = (
                    ScalingSlots(l_UO=leaf[0], rows=rows, index_B=index)
                    if adapter.config.kind == "ia3"
                    else LowRankSlots(a_UIR=leaf[0], b_URO=leaf[1], rows=rows, mask_B1U1=mask)
                )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for linear in self._adapter.linears:
            linear.slots = None
        self._leaves = []

    def backward(self, loss: Tensor) -> None:
        """Backward pass of `loss`, then one pass of the slots' gradients through the mixing graph.

        Gradients accumulate in the adapter's parameters, as after `loss.backward()`. Call it once
        per forward pass: the mixing graph is freed.
        """
        if not self._leaves:
            raise AdapterError("call slots.backward(loss) inside its own `with` block")
        loss.backward()
        mixed: list[Tensor] = []
        gradients: list[Tensor] = []
        for sides, leaves in zip(self._mixed, self._leaves, strict=True):
            for number, side in enumerate(sides):
                if side.requires_grad:
                    parts = [leaf[number] for leaf in leaves]
                    mixed.append(side)
                    gradients.append(
                        torch.stack(
                            [
                                part.grad if part.grad is not None else torch.zeros_like(part)
                                for part in parts
                            ]
                        )
                    )
                    for part in parts:
                        part.grad = None
        if mixed:
            torch.autograd.backward(mixed, gradients)
        if self._row_leaf is not None:
            leaf, task_ids = self._row_leaf
            if leaf.grad is not None:
                self._adapter.add_routing_gradient(task_ids, leaf.grad)
