"""One task's texts to token ids: cut, closed, and what was cut counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mhr_scale.config import BatchConfig, Cut
from mhr_scale.errors import DataError
from mhr_scale.families.family import Family, Side
from mhr_scale.families.packed import EncodedRow, Ids
from mhr_scale.rows.chat import ChatTemplate, Framed
from mhr_scale.tasks.task import Example, Task

SIDES: tuple[Side, ...] = ("input", "target")
#: An id that stands for any text.
TEXT = -1
#: Rows of a task of which `data` can show where they were cut.
SHOWN_ROWS = 3


class RowList(Protocol):
    """The tokenised rows of one task: a list, or a view into memory-mapped files."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> EncodedRow: ...

    def __iter__(self) -> Iterator[EncodedRow]: ...


@dataclass(slots=True)
class Cuts:
    """How many texts were cut or dropped for their length, out of how many."""

    rows: int = 0
    inputs: int = 0
    targets: int = 0
    dropped: int = 0

    def __add__(self, other: "Cuts") -> "Cuts":
        return Cuts(
            self.rows + other.rows,
            self.inputs + other.inputs,
            self.targets + other.targets,
            self.dropped + other.dropped,
        )

    def facts(self) -> dict[str, float]:
        """Shares of cut inputs and targets, and the number of dropped rows."""
        rows = max(1, self.rows)
        return {
            "cut_input_share": self.inputs / rows,
            "cut_target_share": self.targets / rows,
            "dropped_rows": self.dropped,
        }


@dataclass(frozen=True, slots=True)
class Gaps:
    """Behind how many tokens of a row's input, and of its first target, some were cut; -1: none."""

    input: int = -1
    target: int = -1


@dataclass(frozen=True, slots=True)
class _Frame:
    """How a family closes texts: the ids before and behind one, and what an empty one is."""

    begin: list[int]
    end: list[int]
    empty: list[int]

    @classmethod
    def of(cls, family: Family, side: Side, tokenizer: Any) -> "_Frame":
        """The frame of a side; asked for once, not for every row."""
        closed = family.close([TEXT], side, tokenizer)
        place = closed.index(TEXT)
        return cls(closed[:place], closed[place + 1 :], family.close([], side, tokenizer))

    def __len__(self) -> int:
        return len(self.begin) + len(self.end)

    def around(self, ids: list[int]) -> list[int]:
        """A text's ids, closed."""
        return [*self.begin, *ids, *self.end] if ids else list(self.empty)


class Encoder:
    """Tokenises the rows of one task, closes them as the family does, and counts what it cut.

    An input is tokenised as a whole if it is short enough. An over-long one loses tokens where the
    settings or the family say, in front of the task's `suffix`, and of what stands in a chat
    template only what others than the system say, as if their turns were one text. Over-long
    targets lose their end but for the end-of-sequence token.
    """

    def __init__(self, task: Task, tokenizer: Any, config: BatchConfig, family: Family) -> None:
        self.cuts = Cuts()
        self.first_gaps: list[Gaps] = []
        """What was cut of the first rows."""
        self._tokenizer, self._config = tokenizer, config
        self._frames = {side: _Frame.of(family, side, tokenizer) for side in SIDES}
        self._chat = None if task.chat is None else ChatTemplate(tokenizer, task.chat)
        self._limit = task.max_input_tokens or config.max_input_tokens
        self._most_input = self._limit - (len(self._frames["input"]) if self._chat is None else 0)
        self._most_target = config.max_target_tokens - len(self._frames["target"])
        self._cut = config.cut or family.cut_side
        self._name, self._suffix = task.name, task.suffix
        if task.suffix and len(self._ids([task.suffix])[0]) + 1 > self._most_input:
            raise DataError(f"task {task.name}: max_input_tokens {self._limit} is below its suffix")

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _input_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Whole inputs, in their chat template if there is one."""
        if self._chat is None:
            return self._ids([example.input for example in examples])
        return self._ids([self._chat.text(example) for example in examples])

    def rows(self, examples: Sequence[Example]) -> list[EncodedRow]:
        """Tokenise examples, their targets as answers, in one call per side."""
        inputs = self._input_ids(examples)
        texts = iter(self._ids([text for example in examples for text in example.targets]))
        rows = []
        for example, input_ids in zip(examples, inputs, strict=True):
            targets = [next(texts) for _ in example.targets]
            row = self._row(example, input_ids, targets)
            if row is not None:
                rows.append(row)
        return rows

    def inputs(self, examples: Sequence[Example]) -> list[Ids]:
        """The inputs of examples alone; none of them is dropped."""
        self.cuts.rows += len(examples)
        inputs = self._input_ids(examples)
        return [self._input(example, ids)[0] for example, ids in zip(examples, inputs, strict=True)]

    def answers(self, texts: Sequence[str]) -> tuple[Ids, ...]:
        """Texts as answers: cut and closed like targets."""
        return tuple(self._target(ids) for ids in self._ids(texts))

    def _row(
        self, example: Example, input_ids: list[int], targets: list[list[int]]
    ) -> EncodedRow | None:
        cuts = self.cuts
        cuts.rows += 1
        is_long = len(input_ids) > self._most_input
        are_long = [len(target) > self._most_target for target in targets]
        if self._config.too_long == "drop" and (is_long or any(are_long)):
            cuts.dropped += 1
            return None
        cuts.targets += any(are_long)
        closed, gap = self._input(example, input_ids)
        if len(self.first_gaps) < SHOWN_ROWS:
            target_gap = self._most_target if are_long[0] else -1
            self.first_gaps.append(Gaps(gap, target_gap))
        return EncodedRow(closed, tuple(map(self._target, targets)))

    def _input(self, example: Example, ids: list[int]) -> tuple[Ids, int]:
        """An input closed, and cut where it is too long; and where, or -1."""
        gap = -1
        if len(ids) > self._most_input:
            self.cuts.inputs += 1
            ids, gap = self._shorten(example, ids)
        if self._chat is None:
            frame = self._frames["input"]
            ids, gap = frame.around(ids), gap + (len(frame.begin) if gap >= 0 else 0)
        return np.asarray(ids, dtype=np.int32), gap

    def _shorten(self, example: Example, ids: list[int]) -> tuple[list[int], int]:
        """What is left of an over-long input, and behind how many tokens some are missing."""
        kept, bodies = self._parts(example, ids)
        most, n_body = self._most_input - sum(map(len, kept)), sum(map(len, bodies))
        if most < 0:
            place = example.place or f"task {self._name}, example {example.id}"
            raise DataError(
                f"{place}: max_input_tokens {self._limit} is below the {self._limit - most} tokens "
                "of its chat template and system text; raise it or leave the row out "
                "(batch.too_long: drop)"
            )
        first, stop = _cut_out(n_body, most, self._cut)
        short: list[int] = []
        gap, at = -1, 0
        for piece, body in zip(kept, (*bodies, []), strict=True):
            short += piece
            if at <= first < min(stop, at + len(body)):
                gap = len(short) + first - at
            short += body[: max(0, first - at)] + body[max(0, stop - at) :]
            at += len(body)
        return short, gap

    def _parts(self, example: Example, ids: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """An input apart: pieces that stay, and what stands between them, of which some is cut."""
        if self._chat is None and not self._suffix:
            return [[], []], [ids]
        framed = Framed(("", ""), (example.input,))
        if self._chat is not None:
            framed = self._chat.frame(example)
        (*texts, last), (*pieces, end) = framed.texts, framed.pieces
        # a template may have stripped the end of the input
        suffix = next((s for s in (self._suffix, self._suffix.rstrip()) if last.endswith(s)), "")
        pieces = [*pieces, suffix + end]
        apart = self._ids([*pieces, *texts, last.removesuffix(suffix)])
        return apart[: len(pieces)], apart[len(pieces) :]

    def _target(self, ids: list[int]) -> Ids:
        closed = self._frames["target"].around(ids[: self._most_target])
        return np.asarray(closed, dtype=np.int32)


def _cut_out(length: int, most: int, side: Cut) -> tuple[int, int]:
    """The tokens [first, stop) that a text of so many loses so that at most `most` are left."""
    first = {"left": 0, "right": most, "middle": most - most // 2}[side]
    return first, first + max(0, length - most)


def check_rows_left(task: Task, rows: Sequence[EncodedRow], config: BatchConfig) -> None:
    """Raise `DataError` if `too_long: drop` left a task without a training row."""
    if task.train and not rows:
        raise DataError(
            f"task {task.name}: every row is longer than {config.max_input_tokens} / "
            f"{config.max_target_tokens} tokens and too_long is 'drop'; raise the limits or cut"
        )
