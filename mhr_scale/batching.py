"""From examples to batches: tokenise once, deal each global batch into padding-poor micro batches.

A global batch is the same rows whatever the number of ranks. Inside it, rows are sorted by length
and cut into micro batches, which are dealt to ranks in turn: micro batch c goes to rank c mod W.
So every rank pads little, all ranks are equally busy in each micro-step, and two ranks run the very
micro batches that one rank runs alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mhr_scale.config import BatchConfig
from mhr_scale.errors import DataError
from mhr_scale.losses import IGNORE
from mhr_scale.runlog import log
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.mixture import Sample
from mhr_scale.tasks.task import Example, Task

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised example, end-of-sequence tokens included."""

    input_ids: Ids
    targets: tuple[Ids, ...]


@dataclass(slots=True)
class Cuts:
    """How many texts were cut or dropped for their length, out of how many."""

    rows: int = 0
    inputs: int = 0
    targets: int = 0
    dropped: int = 0

    def facts(self) -> dict[str, float]:
        """Shares of cut inputs and targets, and the number of dropped rows."""
        rows = max(1, self.rows)
        return {
            "cut_input_share": self.inputs / rows,
            "cut_target_share": self.targets / rows,
            "dropped_rows": self.dropped,
        }


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded micro batch. `labels` hold -100 where padded; ids and seeds stay on the host."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task_ids: tuple[int, ...]
    numbers: tuple[int, ...]
    n_tokens: int
    n_input_tokens: int

    @property
    def padding_share(self) -> float:
        """Share of the positions of inputs and targets that hold nothing."""
        return 1.0 - self.n_tokens / (self.input_ids.numel() + self.labels.numel())


@dataclass(slots=True)
class Tokenised:
    """All rows of all tasks as token ids, in the order of the tasks."""

    train: list[list[Row]]
    validation: list[list[Row]]
    cuts: Cuts = field(default_factory=Cuts)


def tokenise(tasks: Sequence[Task], tokenizer: Any, config: BatchConfig) -> Tokenised:
    """Tokenise every task's training and validation rows once.

    Over-long inputs lose tokens at their end, in front of the task's `suffix`; over-long targets
    keep their end-of-sequence token. Raises `DataError` if `too_long: drop` empties a task.
    """
    made = Tokenised(train=[], validation=[])
    for task in tasks:
        encode = _Encoder(task, tokenizer, config, made.cuts)
        made.train.append(encode.rows(task.train))
        made.validation.append(encode.rows(task.validation))
        if not made.train[-1]:
            raise DataError(
                f"task {task.name}: every row is longer than {config.max_input_tokens} / "
                f"{config.max_target_tokens} tokens and too_long is 'drop'; raise the limits or cut"
            )
    return made


class _Encoder:
    """Tokenises the rows of one task."""

    def __init__(self, task: Task, tokenizer: Any, config: BatchConfig, cuts: Cuts) -> None:
        self._tokenizer, self._config, self._cuts = tokenizer, config, cuts
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

    def _row(self, example: Example, input_ids: list[int], targets: list[list[int]]) -> Row | None:
        cuts, limit = self._cuts, self._config.max_target_tokens
        cuts.rows += 1
        is_long_input = len(input_ids) + 1 > self._limit
        is_long_target = any(len(target) + 1 > limit for target in targets)
        if self._config.too_long == "drop" and (is_long_input or is_long_target):
            cuts.dropped += 1
            return None
        cuts.inputs += is_long_input
        cuts.targets += is_long_target
        if is_long_input:
            body = input_ids
            if self._suffix:
                (body,) = self._ids([example.input.removesuffix(self._suffix_text)])
            input_ids = body[: self._limit - 1 - len(self._suffix)] + self._suffix
        return Row(self._close(input_ids), tuple(self._close(t[: limit - 1]) for t in targets))

    def _close(self, ids: list[int]) -> Ids:
        return np.asarray([*ids, self._tokenizer.eos_token_id], dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Pick:
    """A row chosen for a place in a batch: its task, its number in the stream, its token ids."""

    number: int
    task: int
    input_ids: Ids
    target_ids: Ids


def pick(
    samples: Sequence[Sample],
    tokenised: Tokenised,
    *,
    references: str,
    seed: int,
) -> list[Pick]:
    """The rows of some samples; of several references the first, or one drawn by the number."""
    picks = []
    for sample in samples:
        row = tokenised.train[sample.task][sample.row]
        which = 0
        if references == "random" and len(row.targets) > 1:
            which = seed_from("reference", seed, sample.number) % len(row.targets)
        picks.append(Pick(sample.number, sample.task, row.input_ids, row.targets[which]))
    return picks


def cut_micro_batches(picks: Sequence[Pick], micro_batch_size: int) -> list[list[Pick]]:
    """Cut rows into micro batches of similar lengths, longest first; a task's rows side by side."""
    by_length = sorted(
        picks, key=lambda p: (-len(p.input_ids), -len(p.target_ids), p.task, p.number)
    )
    return [
        sorted(by_length[start : start + micro_batch_size], key=lambda p: (p.task, p.number))
        for start in range(0, len(by_length), micro_batch_size)
    ]


def collate(
    picks: Sequence[Pick], *, pad_id: int, pad_multiple: int, device: torch.device
) -> Batch:
    """Pad some rows into one batch; inputs to a multiple of `pad_multiple` tokens."""
    longest = max(len(p.input_ids) for p in picks)
    width = -(-longest // pad_multiple) * pad_multiple
    input_ids = np.full((len(picks), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(picks), width), dtype=np.int64)
    labels = np.full((len(picks), max(len(p.target_ids) for p in picks)), IGNORE, dtype=np.int64)
    for row, p in enumerate(picks):
        input_ids[row, : len(p.input_ids)] = p.input_ids
        mask[row, : len(p.input_ids)] = 1
        labels[row, : len(p.target_ids)] = p.target_ids
    n_input = sum(len(p.input_ids) for p in picks)
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device, non_blocking=True),
        attention_mask=torch.from_numpy(mask).to(device, non_blocking=True),
        labels=torch.from_numpy(labels).to(device, non_blocking=True),
        task_ids=tuple(p.task for p in picks),
        numbers=tuple(p.number for p in picks),
        n_tokens=n_input + sum(len(p.target_ids) for p in picks),
        n_input_tokens=n_input,
    )


def validation_picks(tokenised: Tokenised) -> list[Pick]:
    """All validation rows, numbered in the order of the tasks, first references."""
    picks: list[Pick] = []
    for task, rows in enumerate(tokenised.validation):
        for row in rows:
            picks.append(Pick(len(picks), task, row.input_ids, row.targets[0]))
    return picks


def report_cuts(cuts: Cuts, config: BatchConfig) -> None:
    """Say what share of the rows was cut or dropped."""
    facts = cuts.facts()
    log.info(
        "%d rows tokenised; inputs cut at %d tokens: %.1f %%, targets cut at %d: %.1f %%, "
        "dropped: %d",
        cuts.rows,
        config.max_input_tokens,
        100 * facts["cut_input_share"],
        config.max_target_tokens,
        100 * facts["cut_target_share"],
        cuts.dropped,
    )
