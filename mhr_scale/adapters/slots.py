"""Filling slots: the only place where skills are mixed, once per step and shape.

Shape letters: U slots, N linears of one shape, Q splits, S skills, R rank, I and O features of one
split. K inventories: 1 that all slots share, or U, one per slot.

Layers never see the mixing graph. They get mixed pairs as detached leaves, one B per linear and one
A per linear or group of siblings, whose columns are concatenated; padded rows that are not sorted
evenly by slot each become a slot, before sides are rounded. After the backward pass the leaves'
gradients are stacked per shape and pushed once through the mixing graph ("the cut"). Activation
recomputation, accumulation and sharding hooks therefore meet plain LoRA, whatever the method. A
backward pass that would leave gradients in the leaves is refused where it meets them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mhr_scale.adapters.linear import (
    AdaptedLinear,
    AnySlots,
    LowRankSlots,
    ScalingSlots,
    Siblings,
)
from mhr_scale.adapters.products import Cut
from mhr_scale.adapters.row_map import RowMap
from mhr_scale.errors import AdapterError
from mhr_scale.families.sending import send_numbers


def mix_pairs(
    a_NKQSIR: Tensor, b_NKQSRO: Tensor, w_UNQS: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Mix the skills of N linears for U slots: A^q = sum_s w_qs A_qs, B^q likewise.

    Returns A (N, U, Q * I, R), the splits side by side along the input, and scale * B
    (N, U, R, Q * O), side by side along the output (docs/method.md 3). Without weights the slots
    are the single skills themselves (LoRA).
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


#: A module that uses slots.
User: TypeAlias = AdaptedLinear | Siblings


class Slots(AbstractContextManager["Slots"]):
    """The filled slots of one step. Inside the `with` block the model uses them.

    `mixed` are the mixed sides, one entry per shape; `users` are who uses them. `routing` is the
    leaf copy of the routing rows in use, and the function that takes its gradient. The backward
    pass belongs inside the block too, through `backward`.
    """

    def __init__(
        self,
        users: "Users",
        rows: RowMap,
        mixed: Sequence[tuple[Tensor, ...]],
        *,
        kind: str,
        routing: tuple[Tensor, Callable[[Tensor], None]] | None = None,
    ) -> None:
        self._users = users
        self._rows = rows
        self._mixed = mixed
        self._kind = kind
        self._routing = routing
        self._parts: list[tuple[Tensor, list[Tensor]]] = []
        self._in_use: list[User] = []
        self._cut = Cut()

    def __enter__(self) -> "Slots":
        if any(user.slots is not None for group in self._users for user, _ in group.members):
            raise AdapterError("slots are in use already; leave the outer `with` block first")
        self._fill()
        return self

    def _fill(self) -> None:
        """Hand each linear, or group of siblings, its slots."""
        if self._kind == "ia3":
            self._fill_scaling(self._mixed)
        else:
            self._fill_low_rank(self._mixed)

    def _fill_low_rank(self, mixed: Sequence[tuple[Tensor, ...]]) -> None:
        """Hand each linear, or group of siblings, its A and Bs."""
        bs = [self._leaves(b_NURO) for _, b_NURO in mixed]
        for group in self._users:
            sides = [mixed[stack][0] for stack in group.stacks]
            a_NUIR = sides[0] if len(sides) == 1 else torch.cat(sides)
            a_GUIX = a_NUIR if group.index is None else a_NUIR.index_select(0, group.index)
            if group.size > 1:
                # contiguous: at rank 1 every gradient would else be copied into a view's layout
                a_GUIX = a_GUIX.unflatten(0, (-1, group.size)).permute(0, 2, 3, 1, 4).flatten(3)
                a_GUIX = a_GUIX.contiguous()
            for (user, places), a_UIX in zip(group.members, self._leaves(a_GUIX), strict=True):
                pairs = tuple(None if at is None else bs[at[0]][at[1]] for at in places)
                slots = LowRankSlots(a_UIX=a_UIX, b_URO=pairs, rows=self._rows, cut=self._cut)
                self._use(user, slots)

    def _fill_scaling(self, mixed: Sequence[tuple[Tensor, ...]]) -> None:
        """Hand each linear, or group of siblings, its vectors."""
        ls = [self._leaves(l_NUO) for (l_NUO,) in mixed]
        for group in self._users:
            for user, places in group.members:
                vectors = tuple(None if at is None else ls[at[0]][at[1]] for at in places)
                self._use(user, ScalingSlots(l_UO=vectors, rows=self._rows, cut=self._cut))

    def _leaves(self, side: Tensor) -> list[Tensor]:
        """Detached leaves of a tensor (N, U, ...), one for each N; U is squeezed if it is 1."""
        if self._rows.n_slots == 1:
            side = side.squeeze(1)
        leaves = [leaf.requires_grad_(side.requires_grad) for leaf in side.detach().unbind(0)]
        self._parts.append((side, leaves))
        return leaves

    def _use(self, user: User, slots: AnySlots) -> None:
        user.slots = slots
        self._in_use.append(user)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for user in self._in_use:
            user.slots = None
        self._in_use, self._parts = [], []

    def backward(self, loss: Tensor) -> None:
        """Backward pass of `loss`, then one pass of the slots' gradients through the mixing graph.

        Gradients accumulate in the adapter's parameters, as after `loss.backward()`. Call it once
        per forward pass: the mixing graph is freed.
        """
        with self.collecting():
            loss.backward()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """The same where another program runs the backward pass: somewhere in the block, once."""
        if not self._parts:
            raise AdapterError("call slots.backward(loss) inside its own `with` block")
        self._cut.is_open = True
        try:
            yield
        finally:
            self._cut.is_open = False
        self._push()

    def _push(self) -> None:
        """Push the leaves' gradients through the mixing graph."""
        mixed: list[Tensor] = []
        gradients: list[Tensor] = []
        for side, leaves in self._parts:
            if side.requires_grad:
                leaf_gradients = [
                    leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
                    for leaf in leaves
                ]
                mixed.append(side)
                gradients.append(torch.stack(leaf_gradients))
                for leaf in leaves:
                    leaf.grad = None
        if mixed:
            torch.autograd.backward(mixed, gradients)
        if self._routing is not None:
            leaf, deliver = self._routing
            if leaf.grad is not None:
                deliver(leaf.grad)


#: Where the slots of a linear are: the number of its stack, and its own within that.
Place: TypeAlias = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class UserGroup:
    """Users that take their A's out of the same stacks, equally many each.

    `members` are the users, each with the places of its members' slots (None: a member that is not
    adapted); `size` is the number of adapted linears in each. `index` is where their A's lie in
    those of the stacks, one behind the other (None: they are all of them, in order).
    """

    stacks: tuple[int, ...]
    size: int
    members: list[tuple[User, list[Place | None]]]
    index: Tensor | None


#: Who uses the slots of an adapter.
Users: TypeAlias = list[UserGroup]


def find_users(stacks: Sequence[Sequence[AdaptedLinear]]) -> Users:
    """Group the linears of all stacks by who uses their slots: siblings together, others alone."""
    place_of: dict[nn.Module, Place] = {
        linear: (number, n)
        for number, linears in enumerate(stacks)
        for n, linear in enumerate(linears)
    }
    grouped: dict[tuple[tuple[int, ...], int], list[tuple[User, list[Place | None]]]] = {}
    linears_of_all = (linear for linears in stacks for linear in linears)
    for user in dict.fromkeys(linear.siblings or linear for linear in linears_of_all):
        members: Iterable[nn.Module] = user.members if isinstance(user, Siblings) else (user,)
        places = [place_of.get(member) for member in members]
        known = [place for place in places if place is not None]
        key = tuple(sorted({stack for stack, _ in known})), len(known)
        grouped.setdefault(key, []).append((user, places))
    users: Users = []
    for (numbers, size), members_of_group in grouped.items():
        every = [(number, n) for number in numbers for n in range(len(stacks[number]))]
        offsets = {place: offset for offset, place in enumerate(every)}
        order = [offsets[at] for _, places in members_of_group for at in places if at is not None]
        index = None
        if order != list(range(len(every))):
            index = send_numbers(order, stacks[0][0].weight.device)
        users.append(UserGroup(stacks=numbers, size=size, members=members_of_group, index=index))
    return users
