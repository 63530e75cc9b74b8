"""Prompts that begin alike: scores as of each text alone, each beginning computed once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from adapters.tiny import randomise
from placed import place_model
from shared_rows import INSTRUCTION, QUESTION, SHOWN, make_rows
from small_causal import FAMILIES, small_causal

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import DataError
from mhr_scale.families import branched
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes.scoring import choice_losses, rank_choices
from mhr_scale.rows.batching import cut_batches

ON = BackboneConfig(name="x")
#: Whose attention is its file's own; padded rows are all it takes.
PADDED = ("falcon", "falcon new", "gptj")
SHARING = [name for name in FAMILIES if name not in PADDED]
CONFIGS = (
    AdapterConfig(n_skills=3, n_splits=4, rank=2),
    AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=4),
)
#: The ways in which texts may stand: one rectangle or several, branches side by side or not.
LAYINGS = ({}, {"MOST_BEHIND": 1, "LIKE_SHAPE": 1}, {"MOST_BEHIND": 9, "LIKE_SHAPE": 10**9})


#: Tokens that are computed: prompts as far as they are new, then what is read of answers.
WANTED = (
    (INSTRUCTION + SHOWN + 1 + QUESTION, 1),
    (INSTRUCTION + 1 + QUESTION, 2),
    (1 + QUESTION, 5),
    (branched.FEWEST_ALIKE + 8, 0),
    (1 + QUESTION, 4),
    (branched.FEWEST_ALIKE + 8, 1),
    (0, 6),
    (0, 0),
    (1 + QUESTION, 9),
    (30, 3),
)


def placed_as(name: str, *, is_fused: bool, sites: Any = ()) -> PlacedBackbone:
    model = small_causal(name, max_position_embeddings=80, tie_word_embeddings=False)
    if is_fused:
        CAUSAL.fuse(model, ON)
    return place_model(model, sites)


def flat(scores: list[list[float]]) -> list[float]:
    return [value for row in scores for value in row]


@pytest.fixture(params=LAYINGS, ids=["as it is", "narrow", "mixed"])
def laying(request: Any, monkeypatch: Any) -> None:
    for name, value in request.param.items():
        monkeypatch.setattr(branched, name, value)


@pytest.mark.parametrize("name", SHARING)
def test_scores_are_those_of_padded_rows_that_share_nothing(name: str, laying: None) -> None:
    rows = make_rows()
    wanted = flat(rank_choices(placed_as(name, is_fused=False), None, rows, length_norm=1.0))
    placed = placed_as(name, is_fused=True)
    assert placed.lays_flat(True, "packing")
    found = flat(rank_choices(placed, None, rows, length_norm=1.0, is_shared=True))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert placed.pack_shared(rows).n_positions == sum(map(sum, WANTED))


@pytest.mark.parametrize("is_wave", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=["MHR", "IA3"])
def test_every_token_reads_the_slot_of_its_task(config: AdapterConfig, is_wave: bool) -> None:
    rows = make_rows()
    scores = []
    for is_shared in (False, True):
        sites = find_sites(small_causal("gemma3"), config.layout)
        placed = placed_as("gemma3", is_fused=is_shared, sites=sites)
        adapter = Adapter(config, sites, task_names=("copy", "sort"), is_wave=is_wave)
        randomise(adapter).bind(placed.adapted)
        found = rank_choices(placed, adapter, rows, length_norm=1.0, is_shared=is_shared)
        scores.append(flat(found))
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    others = [replace(row, task=1 - row.task) for row in rows]
    found = rank_choices(placed, adapter, others, length_norm=1.0, is_shared=True)
    assert flat(found) != pytest.approx(scores[1], rel=1e-2)


def test_what_rows_of_a_batch_share_counts_once() -> None:
    rows = make_rows()
    placed = placed_as("llama", is_fused=True)
    fresh = [sum(pair) + len(row.answers) for pair, row in zip(WANTED, rows, strict=True)]
    (batch,) = cut_batches(rows, max_tokens=sum(fresh), is_shared=True)
    assert [row.task for row in batch] == sorted(row.task for row in rows)
    assert len(cut_batches(rows, max_tokens=sum(fresh) - 1, is_shared=True)) == 2
    for most in (1, 60, 90, 150):
        batches = cut_batches(rows, max_tokens=most, is_shared=True)
        assert batches == cut_batches(rows[::-1], max_tokens=most, is_shared=True)
        assert sorted(row.number for batch in batches for row in batch) == list(range(len(rows)))
        for batch in batches:
            _, packed = choice_losses(placed, None, batch, is_shared=True)
            n_answers = sum(len(row.answers) for row in batch)
            assert packed.n_positions + n_answers <= most or len(batch) == 1


def test_the_longest_rows_and_those_that_begin_like_them_come_first() -> None:
    rows = make_rows()
    batches = cut_batches(rows, max_tokens=1, is_shared=True)
    assert [row.number for (row,) in batches] == [2, 0, 6, 7, 4, 9, 5, 3, 1, 8]


def test_learned_positions_end_here_too() -> None:
    placed = placed_as("opt", is_fused=True)
    row = EncodedRow(np.arange(5, 80), (np.arange(5, 12),), number=3)
    with pytest.raises(DataError, match="row 3: a prompt and its longest answer are 81 tokens"):
        rank_choices(placed, None, [row], length_norm=1.0, is_shared=True)
