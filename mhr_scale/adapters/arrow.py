"""Arrow: routing per token by the LoRAs' own first right singular directions, without training.

Ostapenko et al. 2024, "Towards Modular LLMs by Building and Routing a Library of LoRAs"
(docs/method.md 18). The experts are the LoRAs of an adapter with private ones.

Shape letters: N linears of one shape, E experts, I in features, O out features, R rank, Y = E * R.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from mhr_scale.adapters.by_token import NOT_TRAINED, Experts, TokenSlots, first_directions
from mhr_scale.adapters.row_map import RowMap
from mhr_scale.adapters.slots import Slots, User, Users
from mhr_scale.errors import AdapterError

#: Of every stack of linears A (N, E, I, R) and B (N, E, R, O), scaled.
Mixed: TypeAlias = Sequence[tuple[Tensor, ...]]
#: A user of slots, the A's of all experts, and what is each member's own.
Side: TypeAlias = tuple[User, Tensor, tuple[Experts | None, ...]]


class Arrow:
    """How tokens choose among the LoRAs of an adapter; what it made of them is kept."""

    def __init__(self, *, top_k: int, temperature: float) -> None:
        self.top_k = top_k
        self.temperature = temperature
        self._made: tuple[Users, torch.dtype, list[Side]] | None = None

    def slots(
        self, users: Users, rows: RowMap, *, dtype: torch.dtype, mix: Callable[[], Mixed]
    ) -> "ArrowSlots":
        """The slots of a pass: the same for all of them, but for the rows that they fit.

        `mix` has the experts' pairs, and is asked where these users have none of them yet: what is
        made of them is kept, for they are not trained.
        """
        if self._made is None or self._made[0] is not users or self._made[1] != dtype:
            with torch.no_grad():
                self._made = users, dtype, list(_make_sides(mix(), users, dtype))
        return ArrowSlots(self, users, rows, self._made[2])


class ArrowSlots(Slots):
    """Slots of one pass that tokens choose from."""

    def __init__(self, arrow: Arrow, users: Users, rows: RowMap, sides: list[Side]) -> None:
        super().__init__(users, rows, (), kind="lora")
        self._arrow = arrow
        self._sides = sides

    @override
    def _fill(self) -> None:
        for user, a_IY, experts in self._sides:
            slots = TokenSlots(
                a_IY=a_IY,
                experts=experts,
                rows=self._rows,
                top_k=self._arrow.top_k,
                temperature=self._arrow.temperature,
            )
            self._use(user, slots)

    @override
    @contextmanager
    def collecting(self) -> Iterator[None]:
        raise AdapterError(NOT_TRAINED)
        yield


def _make_sides(mixed: Mixed, users: Users, dtype: torch.dtype) -> Iterator[Side]:
    """All experts side by side, for every user of slots."""
    for group in users:
        for user, places in group.members:
            known = [place for place in places if place is not None]
            wide = [mixed[stack][0][n].transpose(0, 1).flatten(1) for stack, n in known]
            experts = [
                None if place is None else _experts(*(side[place[1]] for side in mixed[place[0]]))
                for place in places
            ]
            own = tuple(
                e and Experts(b_YO=e.b_YO.to(dtype).contiguous(), c_ER=e.c_ER) for e in experts
            )
            yield user, torch.cat(wide, 1).to(dtype), own


def _experts(a_EIR: Tensor, b_ERO: Tensor) -> Experts:
    return Experts(b_YO=b_ERO.flatten(0, 1), c_ER=first_directions(a_EIR, b_ERO))
