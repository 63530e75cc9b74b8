"""From encoded rows to batches of similar lengths, distributed round-robin over ranks.

A global batch has the same rows whatever the number of ranks. Its rows are sorted by length and cut
into micro batches of equally many rows or, where rows are laid flat, of equally many tokens, as
nearly as they come; micro batch c goes to rank c mod W. So there is little padding, all ranks are
equally busy in each micro-step, and two ranks run the same micro batches that one rank would run.
"""

import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, Dataset

from mhr_scale.config import BatchConfig
from mhr_scale.errors import ConfigError
from mhr_scale.families.branched import begin_alike
from mhr_scale.families.packed import PAD_MULTIPLE, EncodedRow, Packed
from mhr_scale.rows.encode import RowList
from mhr_scale.run import stopping
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.mixture import MixturePlan, Sample

#: The training rows of each task.
TaskRows = Sequence[RowList]
Batch = list[EncodedRow]


def draw_rows(
    samples: Sequence[Sample], rows: TaskRows, *, references: str, seed: int
) -> list[EncodedRow]:
    """The rows of some samples; of several references the first, or one drawn by sample number."""
    drawn = []
    for sample in samples:
        row, which = rows[sample.task][sample.row], 0
        if references == "random" and len(row.answers) > 1:
            which = seed_from("reference", seed, sample.number) % len(row.answers)
        answers = (row.answers[which],)
        drawn.append(replace(row, answers=answers, task=sample.task, number=sample.number))
    return drawn


def number_rows(rows: TaskRows) -> list[EncodedRow]:
    """All rows, numbered in the order of the tasks, with their first references."""
    numbered: list[EncodedRow] = []
    for task, rows_of_task in enumerate(rows):
        for row in rows_of_task:
            answers = row.answers[:1]
            numbered.append(replace(row, answers=answers, task=task, number=len(numbered)))
    return numbered


def cut_batches(
    rows: Sequence[EncodedRow],
    *,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    is_flat: bool = False,
    is_shared: bool = False,
) -> list[Batch]:
    """Cut rows into batches of similar lengths, longest first; inside a batch sorted by task.

    A batch holds at most `max_rows` rows, and at most `max_tokens` tokens, inputs and answers
    together; a row that is longer than that makes a batch of its own. Counted are padded tokens,
    but for rows that are laid flat: of these there are as many batches as of `max_rows` rows, with
    equally many tokens each. With `is_shared` rows of a task that begin alike stay together, and
    what they share in a batch counts once.
    """
    if is_shared and max_tokens is not None:
        return _cut_shared(rows, max_tokens)
    by_length = _by_length(rows)
    if is_flat and max_rows is not None:
        return _cut_evenly(by_length, -(-len(rows) // max_rows))
    batches: list[Batch] = []
    width = depth = n_tokens = 0
    for row in by_length:
        n_tokens += _count(row)
        padded = -(-len(row.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE
        wider, deeper = max(width, padded), max(depth, row.n_answer_tokens)
        count = len(batches[-1]) + 1 if batches else 1
        is_full = (max_rows is not None and count > max_rows) or (
            max_tokens is not None
            and (n_tokens if is_flat else count * (wider + deeper)) > max_tokens
        )
        if is_full or not batches:
            batches.append([row])
            width, depth, n_tokens = padded, row.n_answer_tokens, _count(row)
        else:
            batches[-1].append(row)
            width, depth = wider, deeper
    return [_by_task(batch) for batch in batches]


def _cut_shared(rows: Sequence[EncodedRow], max_tokens: int) -> list[Batch]:
    """Rows that begin alike one behind another, by the longest of them."""
    groups: list[list[tuple[EncodedRow, int]]] = []
    for number, n_alike in begin_alike(rows):
        if not n_alike:
            groups.append([])
        groups[-1].append((rows[number], n_alike))
    groups.sort(key=lambda group: min(_length_first(row) for row, _ in group))
    batches: list[Batch] = []
    n_tokens = 0
    for row, n_alike in itertools.chain(*groups):
        n_tokens += _count(row) - n_alike
        if not batches or n_tokens > max_tokens:
            batches.append([])
            n_tokens = _count(row)
        batches[-1].append(row)
    return [_by_task(batch) for batch in batches]


def _length_first(row: EncodedRow) -> tuple[int, ...]:
    return -len(row.input_ids), -row.n_answer_tokens, row.task, row.number


def _by_length(rows: Sequence[EncodedRow]) -> Batch:
    return sorted(rows, key=_length_first)


def _by_task(rows: Sequence[EncodedRow]) -> Batch:
    return sorted(rows, key=lambda r: (r.task, r.number))


def _count(row: EncodedRow) -> int:
    return len(row.input_ids) + row.n_answer_tokens


def _cut_evenly(rows: Sequence[EncodedRow], n_batches: int) -> list[Batch]:
    """Rows in their order as so many batches, each with a row at least.

    A batch has its share of the tokens that are left: the rows whose middle lies in it.
    """
    counts = [_count(row) for row in rows]
    batches: list[Batch] = []
    start, n_left = 0, sum(counts)
    for more in range(n_batches, 0, -1):
        stop, n_tokens = start + 1, counts[start]
        while len(rows) - stop >= more and more * (2 * n_tokens + counts[stop]) <= 2 * n_left:
            n_tokens += counts[stop]
            stop += 1
        batches.append(_by_task(rows[start:stop]))
        start, n_left = stop, n_left - n_tokens
    return batches


def deal(
    batches: Sequence[Batch], rank: int, world_size: int, *, is_sharded: bool
) -> list[tuple[Batch | None, bool]]:
    """A rank's batches, the same number of rounds on every rank, and whether each counts.

    Batch c goes to rank c mod W. A rank without a batch in the last round is idle, or under ZeRO-3
    runs the shortest batch as a dummy pass.
    """
    rounds: list[tuple[Batch | None, bool]] = [(b, True) for b in batches[rank::world_size]]
    n_rounds = -(-len(batches) // world_size)
    dummy = batches[-1] if batches and is_sharded else None
    return rounds + [(dummy, False)] * (n_rounds - len(rounds))


@dataclass(frozen=True, kw_only=True)
class StepBatches(Dataset[list[Packed]]):
    """A rank's micro batches of any step: a pure function of the plan, the seed and the step."""

    rows: TaskRows
    plan: MixturePlan
    config: BatchConfig
    references: str
    seed: int
    pack: Callable[[Batch], Packed]
    is_flat: bool
    rank: int
    world_size: int

    def samples(self, step: int) -> list[Sample]:
        """The global batch of a step, the same on every rank."""
        size = self.config.batch_size
        return self.plan.samples(step * size, (step + 1) * size)

    def __getitem__(self, step: int) -> list[Packed]:
        rows = draw_rows(self.samples(step), self.rows, references=self.references, seed=self.seed)
        size = self.config.micro_batch_size
        batches = cut_batches(rows, max_rows=size, is_flat=self.is_flat)
        return [self.pack(batch) for batch in batches[self.rank :: self.world_size]]

    def load(self, start: int, stop: int) -> Iterator[list[Packed]]:
        """Batches of the steps [start, stop) in order, prepared ahead by `workers` processes."""
        if not self.config.workers:
            return (self[step] for step in range(start, stop))
        loader = DataLoader(
            _Pickled(self),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.config.workers,
            worker_init_fn=stopping.ignore_signals,
        )
        try:
            return map(pickle.loads, iter(loader))
        except OSError as error:  # their locks lie in shared memory, a few bytes each
            raise ConfigError(
                f"batch.workers: {self.config.workers} processes cannot be started "
                f"({error.strerror}); make room in /dev/shm, or set batch.workers: 0"
            ) from error


@dataclass(frozen=True)
class _Pickled(Dataset[bytes]):
    """Batches as bytes, which workers send through a pipe.

    They would put tensors into shared memory, and if it is too small the loader waits for ever.
    """

    batches: StepBatches

    def __getitem__(self, step: int) -> bytes:
        return pickle.dumps(self.batches[step])
