"""Rows of two tasks whose prompts begin alike, as demonstrations and instructions make them."""

from typing import Any

import numpy as np

from mhr_scale.families import branched
from mhr_scale.families.packed import EncodedRow

#: Tokens of an instruction, of the demonstrations behind it, and of a question.
INSTRUCTION, SHOWN, QUESTION = 18, 20, 4


def make_rows() -> list[EncodedRow]:
    """Rows of two tasks, some with demonstrations, one asked twice, one that is longer, one alone.

    The tasks have one instruction, and in the order of tokens one ends with it and the other begins
    so. Two rows have only a few tokens in common.
    """
    draw = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return draw.integers(5, 90, length)

    def row(task: int, choices: tuple[int, ...], *parts: Any) -> EncodedRow:
        number = len(rows)
        answers = tuple(ids(n) for n in choices)
        rows.append(EncodedRow(np.concatenate(parts), answers, task=task, number=number))
        return rows[-1]

    rows: list[EncodedRow] = []
    instruction, shown = ids(INSTRUCTION), ids(SHOWN)
    few = np.append(94, ids(branched.FEWEST_ALIKE - 2))  # behind the instruction in order
    first = row(1, (2, 1), instruction, shown, [1], ids(QUESTION))
    row(0, (1, 3), instruction, [1], ids(QUESTION))
    row(1, (3, 3, 2), instruction, [2], ids(QUESTION))
    row(1, (1,), few, [1], ids(8))
    row(1, (4, 2), instruction, shown, [2], ids(QUESTION))
    row(1, (2,), few, [2], ids(8))
    row(1, (1, 5, 2, 2), first.input_ids)
    row(1, (1, 1), first.input_ids)
    row(0, (2,) * 9, instruction, [2], ids(QUESTION))
    row(0, (2, 3), [3], ids(29))
    return rows
