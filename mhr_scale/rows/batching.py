"""From token ids to batches: deal each global batch into padding-poor micro batches.

A global batch is the same rows whatever the number of ranks. Inside it, rows are sorted by length
and cut into micro batches, which are dealt to ranks in turn: micro batch c goes to rank c mod W.
So every rank pads little, all ranks are equally busy in each micro-step, and two ranks run the very
micro batches that one rank runs alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mhr_scale.config import BatchConfig
from mhr_scale.rows.encode import Ids, RowList
from mhr_scale.run import stopping
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.mixture import MixturePlan, Sample

#: The label of a position that has no token to predict, as torch's cross-entropy knows it.
IGNORE = -100

Rows = Sequence[RowList]


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded micro batch: `labels` hold -100 where padded; only tensors leave the host."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task_ids: tuple[int, ...]
    numbers: tuple[int, ...]
    n_tokens: int
    n_input_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class Pick:
    """A row chosen for a place in a batch: its task, its number in the stream, its token ids."""

    number: int
    task: int
    input_ids: Ids
    target_ids: Ids


def pick(samples: Sequence[Sample], rows: Rows, *, references: str, seed: int) -> list[Pick]:
    """The rows of some samples; of several references the first, or one drawn by the number.

    `rows` holds the training rows of each task.
    """
    picks = []
    for sample in samples:
        row = rows[sample.task][sample.row]
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


def pad(
    inputs: Sequence[Ids], *, pad_id: int, multiple: int, at_least: int = 0
) -> tuple[Tensor, Tensor]:
    """Inputs and attention mask (B, L), padded on the right to a multiple of `multiple` tokens."""
    width = max(at_least, *(len(ids) for ids in inputs))
    width = -(-width // multiple) * multiple
    input_ids = np.full((len(inputs), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(inputs), width), dtype=np.int64)
    for row, ids in enumerate(inputs):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(mask)


def collate(picks: Sequence[Pick], *, pad_id: int, pad_multiple: int) -> Batch:
    """Pad some rows into one batch; inputs to a multiple of `pad_multiple` tokens."""
    inputs = [p.input_ids for p in picks]
    input_ids, mask = pad(inputs, pad_id=pad_id, multiple=pad_multiple)
    labels = np.full((len(picks), max(len(p.target_ids) for p in picks)), IGNORE, dtype=np.int64)
    for row, p in enumerate(picks):
        labels[row, : len(p.target_ids)] = p.target_ids
    n_input = sum(map(len, inputs))
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=torch.from_numpy(labels),
        task_ids=tuple(p.task for p in picks),
        numbers=tuple(p.number for p in picks),
        n_tokens=n_input + sum(len(p.target_ids) for p in picks),
        n_input_tokens=n_input,
    )


def number_rows(rows: Rows) -> list[Pick]:
    """All rows, numbered in the order of the tasks, with their first references."""
    picks: list[Pick] = []
    for task, rows_of_task in enumerate(rows):
        for row in rows_of_task:
            picks.append(Pick(len(picks), task, row.input_ids, row.targets[0]))
    return picks


@dataclass(frozen=True, kw_only=True)
class StepBatches(Dataset[list[Batch]]):
    """A rank's micro batches of any step: a pure function of the plan, the seed and the step."""

    rows: Rows
    plan: MixturePlan
    config: BatchConfig
    references: str
    seed: int
    pad_id: int
    rank: int
    world_size: int

    def samples(self, step: int) -> list[Sample]:
        """The global batch of a step, the same on every rank."""
        size = self.config.batch_size
        return self.plan.samples(step * size, (step + 1) * size)

    def __getitem__(self, step: int) -> list[Batch]:
        picks = pick(self.samples(step), self.rows, references=self.references, seed=self.seed)
        chunks = cut_micro_batches(picks, self.config.micro_batch_size)
        return [self.collate(chunk) for chunk in chunks[self.rank :: self.world_size]]

    def collate(self, picks: Sequence[Pick]) -> Batch:
        """Pad some rows as the recipe says."""
        return collate(picks, pad_id=self.pad_id, pad_multiple=self.config.pad_multiple)

    def load(self, start: int, stop: int) -> DataLoader[list[Batch]]:
        """Batches of the steps [start, stop) in order, prepared ahead by `workers` processes."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.config.workers,
            worker_init_fn=stopping.ignore_signals,
        )
