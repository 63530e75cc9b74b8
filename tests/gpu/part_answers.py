"""Ranking choices and generating answers over T5-XXL and Llama-8B, in examples a second."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from board import Board, Found, Scale
from card_models import LLAMA_8B, MHR_8, T0_11B, Backbones
from paired import GIB, Timed, take_turns
from rank_causal import LAYINGS, MAX_TOKENS, make_alike
from torch import nn

from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes.scoring import generate_answers, rank_choices
from mhr_scale.planning.steps import fresh
from mhr_scale.rows.batching import cut_batches

BACKBONES = {"T5-XXL": T0_11B, "Llama-8B": LLAMA_8B}
#: Rows that are answered at once, and tokens of an answer: random weights rarely end one earlier.
N_ANSWERED, NEW_TOKENS = 32, 32
#: How far the scores of rows that lie otherwise may be from those of padded ones, in bfloat16.
SCORES_WITHIN = 0.02


class Answering:
    """A way of `paired` whose step answers all rows."""

    def __init__(self, name: str, model: nn.Module, rows: int, run: Callable[[], Any]) -> None:
        self.name, self.model, self.rows, self.run = name, model, rows, run
        self.found: Any = None

    def step(self) -> None:
        """Once."""
        self.found = self.run()


class NoTexts:
    """A stand-in for a tokenizer: answers are not read."""

    def batch_decode(self, ids: Sequence[Any], **_: Any) -> list[str]:
        """A text for each."""
        return ["" for _ in ids]


def measure(board: Board, scale: Scale) -> None:
    """Both backbones, one after the other."""
    for title, name in BACKBONES.items():
        layings = [one for one in LAYINGS if one != "shared" or name == LLAMA_8B]
        names = [f"{title}, ranking, {one}" for one in layings] + [f"{title}, generating"]
        board.run_together(
            names,
            lambda n=name, t=title, each=layings: {
                f"{t}, {way}": found for way, found in answer(n, each, scale).items()
            },
        )


def answer(name: str, layings: Sequence[str], scale: Scale) -> dict[str, Found | str]:
    """Rank the same rows as they may lie, and generate answers to some of them."""
    backbones = Backbones(name, scale)
    placed = backbones.place(MHR_8)
    placed.model.eval()
    adapter = fresh(MHR_8, 2)(backbones.bare())
    for own, tensor in adapter.inventory.named_tensors():
        if own.endswith(".B"):
            tensor.normal_(0.0, 0.02)
    adapter.to(placed.device)
    adapter.bind(placed.adapted)
    model = nn.ModuleList([placed.model, adapter])
    rows = make_alike(placed.model)[:: 16 if scale.is_tiny else 1]
    rows = [replace(row, number=number) for number, row in enumerate(rows)]

    def rank(options: dict[str, bool]) -> list[float]:
        scores: dict[int, list[float]] = {}
        for batch in cut_batches(rows, max_tokens=MAX_TOKENS, **options):
            ranked = rank_choices(placed, adapter, batch, length_norm=0.0, **options)
            scores |= {row.number: own for row, own in zip(batch, ranked, strict=True)}
        return [value for number in range(len(rows)) for value in scores[number]]

    n_answered, new_tokens = (2, 3) if scale.is_tiny else (N_ANSWERED, NEW_TOKENS)
    asked = [EncodedRow(row.input_ids, task=row.task, number=row.number) for row in rows]

    def generate() -> list[str]:
        return generate_answers(
            placed, adapter, asked[:n_answered], NoTexts(), beams=1, max_new_tokens=new_tokens
        )

    ways = [
        Answering(f"ranking, {one}", model, len(rows), lambda o=LAYINGS[one]: rank(o))
        for one in layings
    ]
    ways.append(Answering("generating", model, n_answered, generate))
    found = take_turns(ways, scale, turns=3)
    return {way.name: entry_of(found[way.name], way, ways[0]) for way in ways}


def entry_of(timed: Timed, way: Answering, padded: Answering) -> Found | str:
    """Examples a second; scores are compared with those of padded rows."""
    if timed.error:
        return timed.error
    values: dict[str, Any] = {
        "examples_per_s": way.rows / timed.median,
        "gib_above_weights": timed.above / GIB,
    }
    if way.name == "generating" or padded.found is None:
        return Found(values)
    wanted, own = np.array(padded.found), np.array(way.found)
    furthest = float(np.abs(own / wanted - 1.0).max())
    goal = f"scores within {SCORES_WITHIN:.0%} of padded ones"
    return Found({**values, "furthest_score": furthest}, furthest <= SCORES_WITHIN, goal)
