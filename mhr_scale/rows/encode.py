"""One task's texts to token ids: cut, closed, and what was cut counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mhr_scale.config import BatchConfig
from mhr_scale.errors import DataError
from mhr_scale.families.family import Family
from mhr_scale.families.packed import EncodedRow, Ids
from mhr_scale.tasks.task import Example, Task


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


class Encoder:
    """Tokenises the rows of one task, closes them as the family does, and counts what it cut.

    Over-long inputs lose tokens on the family's side, in front of the task's `suffix`; over-long
    targets lose their end but for the end-of-sequence token.
    """

    def __init__(self, task: Task, tokenizer: Any, config: BatchConfig, family: Family) -> None:
        self.cuts = Cuts()
        self._tokenizer, self._config, self._family = tokenizer, config, family
        closing = [family.close([], side, tokenizer) for side in ("input", "target")]
        self._most_input = (task.max_input_tokens or config.max_input_tokens) - len(closing[0])
        self._most_target = config.max_target_tokens - len(closing[1])
        self._suffix_text = task.suffix
        self._suffix = self._ids([task.suffix])[0] if task.suffix else []
        if len(self._suffix) + 1 > self._most_input:
            limit = self._most_input + len(closing[0])
            raise DataError(f"task {task.name}: max_input_tokens {limit} is below its suffix")

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def rows(self, examples: Sequence[Example]) -> list[EncodedRow]:
        """Tokenise examples, their targets as answers, in one call per side."""
        inputs = self._ids([example.input for example in examples])
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
        inputs = self._ids([example.input for example in examples])
        return [self._input(example, ids) for example, ids in zip(examples, inputs, strict=True)]

    def answers(self, texts: Sequence[str]) -> tuple[Ids, ...]:
        """Texts as answers: cut and closed like targets."""
        return tuple(self._target(ids) for ids in self._ids(texts))

    def _row(
        self, example: Example, input_ids: list[int], targets: list[list[int]]
    ) -> EncodedRow | None:
        cuts = self.cuts
        cuts.rows += 1
        is_long = len(input_ids) > self._most_input
        is_long_target = any(len(target) > self._most_target for target in targets)
        if self._config.too_long == "drop" and (is_long or is_long_target):
            cuts.dropped += 1
            return None
        cuts.targets += is_long_target
        return EncodedRow(self._input(example, input_ids), tuple(map(self._target, targets)))

    def _input(self, example: Example, ids: list[int]) -> Ids:
        """An input closed, and cut where it is too long."""
        if len(ids) > self._most_input:
            self.cuts.inputs += 1
            if self._suffix:
                (ids,) = self._ids([example.input.removesuffix(self._suffix_text)])
            most = self._most_input - len(self._suffix)
            kept = ids[:most] if self._family.cut_side == "right" else ids[-most:]
            ids = kept + self._suffix
        return np.asarray(self._family.close(ids, "input", self._tokenizer), dtype=np.int32)

    def _target(self, ids: list[int]) -> Ids:
        cut = ids[: self._most_target]
        return np.asarray(self._family.close(cut, "target", self._tokenizer), dtype=np.int32)


def check_rows_left(task: Task, rows: Sequence[EncodedRow], config: BatchConfig) -> None:
    """Raise `DataError` if `too_long: drop` left a task without a training row."""
    if task.train and not rows:
        raise DataError(
            f"task {task.name}: every row is longer than {config.max_input_tokens} / "
            f"{config.max_target_tokens} tokens and too_long is 'drop'; raise the limits or cut"
        )
