"""The two shapes of a row on its way into a model: token ids, then tensors.

Shape letters: B rows, L tokens of an input, D target positions, answers side by side.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mhr_scale.errors import DataError
from mhr_scale.families.flat import Flat
from mhr_scale.families.sending import send
from mhr_scale.families.sequences import Stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[Any]
else:  # adapters, which know families, need torch alone
    Ids = Any

#: The label of a position that has no token to predict, as torch's cross-entropy knows it.
IGNORE = -100
#: Inputs are padded to a multiple of this many tokens: attention kernels want aligned masks.
PAD_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row of text as token ids.

    `answers` are the references of a training row, the choices of a ranked one, or nothing where an
    answer is to be generated; each ends with an end-of-sequence token. `label` tells which of them
    is right. `task` is the number of the row's task, or job, whose slot it reads; `number` its
    place in the stream, or in the list that is scored.
    """

    input_ids: Ids
    answers: tuple[Ids, ...] = ()
    label: int = 0
    task: int = 0
    number: int = 0

    def __post_init__(self) -> None:
        if not all(len(answer) for answer in self.answers):
            raise DataError(f"row {self.number}: an answer has no tokens; close it first")

    @property
    def n_answer_tokens(self) -> int:
        """Target positions the row takes, all answers side by side."""
        return sum(len(answer) for answer in self.answers)


class Targets(NamedTuple):
    """Where the target positions of rows laid flat stand among their labels (B, D).

    `places_N` is the place of each in the flattened labels; `sources_N` the row of the logits
    (N, V) that predicts it, None where each has its own, in order.
    """

    places_N: Tensor
    sources_N: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Some rows as a model takes them, and what it is to predict: the one argument of a pass.

    `inputs` are the tensors that the family's passes hand to the model. `labels_BD` holds the token
    to predict at each target position, `IGNORE` where padded; `choices_BD` which of its row's
    answers a position belongs to, -1 where padded; `starts`, per row, where each answer begins.
    """

    rows: tuple[EncodedRow, ...]
    inputs: Mapping[str, Tensor]
    labels_BD: Tensor
    choices_BD: Tensor
    starts: tuple[tuple[int, ...], ...]
    n_positions: int
    """Positions that the model computes, padding included."""
    n_padding: int
    """How many of them are padding."""
    sources: Tensor | Targets | None = None
    """Of padded rows the column (B, D) of the model's predictions that a target position reads,
    None: its own; of rows laid flat the targets."""
    flat: Flat | None = None
    """The sequences of rows laid flat; None: rows are padded."""

    @cached_property
    def tasks(self) -> tuple[int, ...]:
        """The slot that each row reads."""
        return tuple(row.task for row in self.rows)

    @cached_property
    def n_choices(self) -> int:
        """The most answers that a row has."""
        return max(len(starts) for starts in self.starts)

    @property
    def n_input_tokens(self) -> int:
        """Tokens of the inputs, padding apart."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def n_target_tokens(self) -> int:
        """Tokens to predict."""
        return sum(row.n_answer_tokens for row in self.rows)

    def to(self, device: torch.device) -> "Packed":
        """The same rows with their tensors on `device`."""

        sources = self.sources
        if isinstance(sources, Targets):
            own = sources.sources_N
            own = None if own is None else send(own, device)
            sources = Targets(send(sources.places_N, device), own)
        elif sources is not None:
            sources = send(sources, device)
        return replace(
            self,
            inputs={name: send(tensor, device) for name, tensor in self.inputs.items()},
            labels_BD=send(self.labels_BD, device),
            choices_BD=send(self.choices_BD, device),
            sources=sources,
            flat=None if self.flat is None else self.flat.to(device),
        )

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The sequences that linears see, where rows are laid flat."""
        return () if self.flat is None else self.flat.streams

    def in_use(self) -> AbstractContextManager[object]:
        """The block of the forward and backward pass of these rows."""
        return nullcontext() if self.flat is None else self.flat


def pad_ids(
    inputs: Sequence[Ids], *, pad_id: int, multiple: int = PAD_MULTIPLE, at_least: int = 0
) -> tuple[Any, Any]:
    """Arrays of ids and mask (B, L), padded on the right to a multiple of `multiple` tokens."""
    import numpy as np

    width = max(at_least, *(len(ids) for ids in inputs))
    width = -(-width // multiple) * multiple
    input_ids = np.full((len(inputs), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(inputs), width), dtype=np.int64)
    for row, ids in enumerate(inputs):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return input_ids, mask


def lay_answers(
    rows: Sequence[EncodedRow], *, start_id: int, pad_id: int, at_least: int = 0
) -> tuple[Any, Any, Any, tuple[tuple[int, ...], ...]]:
    """Arrays of answers side by side, as wide as the row with most tokens or wider: (B, D) each.

    Returns the tokens that are read, each answer's shifted by one behind `start_id`; the labels;
    the answer of each position; and where each begins.
    """
    import numpy as np

    shape = (len(rows), max(at_least, *(row.n_answer_tokens for row in rows)))
    read = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    choices = np.full(shape, -1, dtype=np.int64)
    starts = []
    for number, row in enumerate(rows):
        begins, at = [], 0
        for choice, answer in enumerate(row.answers):
            end = at + len(answer)
            read[number, at] = start_id
            read[number, at + 1 : end] = answer[:-1]
            labels[number, at:end] = answer
            choices[number, at:end] = choice
            begins.append(at)
            at = end
        starts.append(tuple(begins))
    return read, labels, choices, tuple(starts)


def read_at(tokens_BD: Any, labels_BD: Any) -> tuple[Tensor, Targets]:
    """The tokens of a sequence that predict a target, and which of them each target reads.

    `tokens_BD` tells which token of the sequence predicts a target; arrays.
    """
    import numpy as np

    places = np.flatnonzero(labels_BD != IGNORE)
    wanted = tokens_BD.reshape(-1)[places]
    reads, sources = np.unique(wanted, return_inverse=True)
    has_own = len(reads) == len(wanted) and bool((reads == wanted).all())
    targets = Targets(torch.from_numpy(places), None if has_own else torch.from_numpy(sources))
    return torch.from_numpy(reads), targets
