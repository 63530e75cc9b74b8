"""Ranked rows whose prompts begin alike: an instruction, few-shot demonstrations, a template.

All texts of a batch, prompts and the answers behind them, are branches of trees: of a task's rows,
in the order of their tokens, each goes on where it parts from the one before. So a token that
several texts begin with stands once in the sequence, at any number of levels, and only attention
repeats it (`flat.BranchedStream`). There the branches behind a stem stand side by side, as many as
the stem is long, and those that are left behind the same stem again.

Shape letters: B rows, D target positions, L and K queries and keys of a row of a rectangle.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mhr_scale.families.flat import Flat
from mhr_scale.families.packed import EncodedRow, Ids, Packed, lay_answers, read_at
from mhr_scale.families.sequences import BranchedStream, Rectangle

#: Tokens that prompts have in common at least, for which it pays to have them once.
FEWEST_ALIKE = 16
#: Tokens of branches side by side at most, if their stem is not longer.
MOST_BEHIND = 128
#: How many times smaller than its rectangle a row of it may be.
LIKE_SHAPE = 4


def begin_alike(rows: Sequence[EncodedRow]) -> list[tuple[int, int]]:
    """The places of rows, sorted by task and tokens, and how many tokens each begins with as the
    one before; 0 where those are few or of another task."""
    keys = [np.asarray(row.input_ids).astype(">u4").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (rows[n].task, keys[n], rows[n].number))
    found: list[tuple[int, int]] = []
    for number in order:
        n_alike = 0
        if found and rows[found[-1][0]].task == rows[number].task:
            n_alike = _count_alike(rows[found[-1][0]].input_ids, rows[number].input_ids)
        found.append((number, n_alike if n_alike >= FEWEST_ALIKE else 0))
    return found


def _count_alike(one: Ids, other: Ids) -> int:
    shortest = min(len(one), len(other))
    differs = np.flatnonzero(np.asarray(one)[:shortest] != np.asarray(other)[:shortest])
    return int(differs[0]) if len(differs) else shortest


def pack(rows: Sequence[EncodedRow], *, pad_multiple: int) -> Packed:
    """Rows laid flat, of whose prompts each beginning stands once.

    The tokens of a row are those that no row before it in the order of `begin_alike` has.
    """
    alike = begin_alike(rows)
    fresh = [0] * len(rows)
    for number, n_alike in alike:
        n_read = rows[number].n_answer_tokens - len(rows[number].answers)
        fresh[number] = len(rows[number].input_ids) - n_alike + n_read
    starts = np.cumsum([0, *fresh])
    n_tokens = int(starts[-1])
    ids, positions = (np.zeros(n_tokens, dtype=np.int64) for _ in range(2))
    _, labels, choices, answer_starts = lay_answers(rows, start_id=0, pad_id=0)
    tokens_BD = np.zeros(labels.shape, dtype=np.int64)
    branches: list[_Branches] = []
    prompt = np.zeros(0, dtype=np.int64)
    for number, n_alike in alike:
        row, at = rows[number], int(starts[number])
        n_prompt = len(row.input_ids)
        texts = [(n_alike, row.input_ids[n_alike:])]
        texts += [(n_prompt, answer[:-1]) for answer in row.answers]
        column = 0
        for which, (depth, text) in enumerate(texts):
            tokens = np.arange(at, at + len(text))
            at += len(text)
            ids[tokens], positions[tokens] = text, np.arange(depth, depth + len(text))
            if len(tokens):
                if not (branches and branches[-1].takes(tokens, depth, is_prompt=not which)):
                    branches.append(_Branches(prompt[:depth]))
                branches[-1].add(tokens, depth)
            if which:
                tokens_BD[number, column : column + len(text) + 1] = [prompt[-1], *tokens]
                column += len(text) + 1
            else:
                prompt = np.concatenate([prompt[:depth], tokens])
    reads, targets = read_at(tokens_BD, labels)
    rectangles, places = _rectangles(branches, n_tokens, pad_multiple)
    stream = BranchedStream(tuple(fresh), n_tokens, rectangles, places)
    return Packed(
        rows=tuple(rows),
        inputs={
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "reads": reads,
        },
        labels_BD=torch.from_numpy(labels),
        choices_BD=torch.from_numpy(choices),
        starts=answer_starts,
        n_positions=n_tokens,
        n_padding=0,
        sources=targets,
        flat=Flat((stream,)),
    )


class _Branches:
    """Branches side by side behind a stem, which becomes a row of a rectangle.

    The stem is keys of other rows, or where there are none, the first text. Tokens are told by
    their number in the sequence.
    """

    def __init__(self, stem: Ids) -> None:
        self.n_stem = self.size = len(stem)
        self.keys = [stem]
        #: Texts that others may stand behind: where each begins, its depth, its length.
        self.open = [(0, 0, len(stem))]
        #: Ranges of keys, and where they end being open.
        self.shut: list[tuple[int, int, int]] = []

    @property
    def n_queries(self) -> int:
        return self.size - self.n_stem

    def takes(self, tokens: Ids, depth: int, *, is_prompt: bool) -> bool:
        """Whether a text that goes on at a depth of the one before is to stand here too."""
        if depth == 0 or (is_prompt and not self.n_stem):
            return False
        stem = self.n_stem or len(self.keys[1])
        return self.size - stem + len(tokens) <= max(MOST_BEHIND, stem)

    def add(self, tokens: Ids, depth: int) -> None:
        """Put a text behind the first `depth` tokens of the one before."""
        self._shut(depth)
        self.open.append((self.size, depth, len(tokens)))
        self.keys.append(tokens)
        self.size += len(tokens)

    def _shut(self, depth: int) -> None:
        """What stands deeper is open to nothing that follows."""
        while self.open:
            start, above, length = self.open.pop()
            stays = min(max(depth - above, 0), length)
            self.shut.append((start + stays, start + length, self.size))
            if stays:
                self.open.append((start, above, stays))
                return

    def ends(self) -> Ids:
        """Of each key, where it ends being open."""
        self._shut(0)
        ends = np.zeros(self.size, dtype=np.int64)
        for start, stop, end in self.shut:
            ends[start:stop] = end
        return ends


def _rectangles(
    branches: Sequence[_Branches], n_tokens: int, pad_multiple: int
) -> tuple[tuple[Rectangle, ...], torch.Tensor]:
    """Rectangles of rows of like shape, and where in them the query of each token stands."""
    groups: list[list[_Branches]] = []
    for row in sorted(branches, key=lambda b: -b.n_queries * b.size):
        if groups:
            width, depth = _shape([*groups[-1], row])
            if width * depth <= LIKE_SHAPE * row.n_queries * row.size:
                groups[-1].append(row)
                continue
        groups.append([row])
    found, places, start = [], np.zeros(n_tokens, dtype=np.int64), 0
    for group in groups:
        width, depth = _shape(group)
        depth = -(-depth // pad_multiple) * pad_multiple
        queries, own = (np.zeros((len(group), width), dtype=np.int64) for _ in range(2))
        keys, ends = (np.zeros((len(group), depth), dtype=np.int64) for _ in range(2))
        for number, row in enumerate(group):
            tokens = np.concatenate(row.keys)
            keys[number, : row.size], ends[number, : row.size] = tokens, row.ends()
            queries[number, : row.n_queries] = tokens[row.n_stem :]
            # where no query is stands one that looks at the first key
            own[number, : row.n_queries] = np.arange(row.n_stem, row.size)
            first = start + number * width
            places[tokens[row.n_stem :]] = np.arange(first, first + row.n_queries)
        start += queries.size
        found.append(Rectangle(*map(torch.from_numpy, (queries, keys, own, ends))))
    return tuple(found), torch.from_numpy(places)


def _shape(rows: Sequence[_Branches]) -> tuple[int, int]:
    """Queries and keys of the longest of some rows."""
    return max(row.n_queries for row in rows), max(row.size for row in rows)
