"""One task's texts to token ids: cutting, closing with end-of-sequence, counting what was cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mhr_scale.config import BatchConfig
from mhr_scale.errors import DataError
from mhr_scale.tasks.task import Example, Task

Ids = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised example, end-of-sequence tokens included."""

    input_ids: Ids
    targets: tuple[Ids, ...]


class RowList(Protocol):
    """The tokenised rows of one task: a list, or a view into memory-mapped files."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...

    def __iter__(self) -> Iterator[Row]: ...


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


class Encoder:
    """Tokenises the rows of one task and counts what it cut.

    Over-long inputs lose tokens at their end, in front of the task's `suffix`; over-long targets
    keep their end-of-sequence token.
    """

    def __init__(self, task: Task, tokenizer: Any, config: BatchConfig) -> None:
        self.cuts = Cuts()
        self._tokenizer, self._config = tokenizer, config
        self._limit = task.max_input_tokens or config.max_input_tokens
        self._suffix_text = task.suffix
        self._suffix = self._ids([task.suffix])[0] if task.suffix else []
        if len(self._suffix) + 2 > self._limit:
            raise DataError(f"task {task.name}: max_input_tokens {self._limit} is below its suffix")

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """Tokenise examples in one call per side."""
        inputs = self._ids([example.input for example in examples])
        targets = self._ids([text for example in examples for text in example.targets])
        rows, used = [], 0
        for example, input_ids in zip(examples, inputs, strict=True):
            own = targets[used : used + len(example.targets)]
            used += len(example.targets)
            row = self._row(example, input_ids, own)
            if row is not None:
                rows.append(row)
        return rows

    def inputs(self, examples: Sequence[Example]) -> list[Ids]:
        """The inputs of examples alone; none of them is dropped."""
        self.cuts.rows += len(examples)
        inputs = self._ids([example.input for example in examples])
        return [self._input(example, ids) for example, ids in zip(examples, inputs, strict=True)]

    def answers(self, texts: Sequence[str]) -> list[Ids]:
        """Texts as answers: cut like targets, closed with the end-of-sequence token."""
        limit = self._config.max_target_tokens - 1
        return [self._close(ids[:limit]) for ids in self._ids(texts)]

    def _row(self, example: Example, input_ids: list[int], targets: list[list[int]]) -> Row | None:
        cuts, limit = self.cuts, self._config.max_target_tokens
        cuts.rows += 1
        is_long_target = any(len(target) + 1 > limit for target in targets)
        if self._config.too_long == "drop" and (self._is_long(input_ids) or is_long_target):
            cuts.dropped += 1
            return None
        cuts.targets += is_long_target
        closed = tuple(self._close(target[: limit - 1]) for target in targets)
        return Row(self._input(example, input_ids), closed)

    def _is_long(self, input_ids: list[int]) -> bool:
        return len(input_ids) + 1 > self._limit

    def _input(self, example: Example, ids: list[int]) -> Ids:
        """An input closed, and cut where it is too long."""
        if not self._is_long(ids):
            return self._close(ids)
        self.cuts.inputs += 1
        if self._suffix:
            (ids,) = self._ids([example.input.removesuffix(self._suffix_text)])
        return self._close(ids[: self._limit - 1 - len(self._suffix)] + self._suffix)

    def _close(self, ids: list[int]) -> Ids:
        return np.asarray([*ids, self._tokenizer.eos_token_id], dtype=np.int32)


def check_rows_left(task: Task, rows: Sequence[Row], config: BatchConfig) -> None:
    """Raise `DataError` if `too_long: drop` left a task without a training row."""
    if task.train and not rows:
        raise DataError(
            f"task {task.name}: every row is longer than {config.max_input_tokens} / "
            f"{config.max_target_tokens} tokens and too_long is 'drop'; raise the limits or cut"
        )
