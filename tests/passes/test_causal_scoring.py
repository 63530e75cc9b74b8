"""Decoder-only backbones: ranked scores and generated answers against one text at a time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from adapters.tiny import randomise
from placed import place_model
from small_causal import FAMILIES, SIZES, small_causal
from torch.nn import functional as F

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.errors import DataError
from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes import scoring
from mhr_scale.passes.losses import tfew
from mhr_scale.passes.scoring import generate_answers, rank_choices, split
from mhr_scale.rows.batching import cut_batches

#: Lengths of prompts, and of the choices behind each.
ROWS = ((21, (3, 1, 4)), (7, (2,)), (30, (1, 2, 12)))
WORDS = SIZES["vocab_size"]
LEARNED = ("gpt2", "opt")


def untied(name: str, **changes: Any) -> Any:
    """A model that does not repeat its last token, as tied ones of such weights do."""
    return small_causal(name, **{"tie_word_embeddings": False, "eos_token_id": 1, **changes})


def make_rows(shapes: Any = ROWS, end: int = 1) -> list[EncodedRow]:
    draw = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return draw.integers(5, WORDS, length)

    return [
        EncodedRow(
            ids(prompt),
            tuple(np.append(ids(length - 1), end) for length in choices),
            number=number,
        )
        for number, (prompt, choices) in enumerate(shapes)
    ]


@torch.no_grad()
def one_by_one(model: Any, row: EncodedRow) -> list[float]:
    """The mean negative log-likelihood of each choice: the whole text alone, nothing of ours."""
    scores = []
    for choice in row.answers:
        ids = torch.tensor(np.concatenate([row.input_ids, choice]))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row.input_ids) - 1 : -1]
        scores.append(F.cross_entropy(logits, torch.tensor(choice)).item())
    return scores


def flat(scores: list[list[float]]) -> list[float]:
    return [value for row in scores for value in row]


@pytest.mark.parametrize("name", FAMILIES)
def test_ranked_scores_equal_one_text_at_a_time(name: str, monkeypatch: Any) -> None:
    model = untied(name)
    placed, rows = place_model(model), make_rows()
    wanted = flat([one_by_one(model, row) for row in rows])
    found = flat(rank_choices(placed, None, rows, length_norm=1.0))
    assert found == pytest.approx(wanted, rel=2e-5, abs=2e-5)
    monkeypatch.setattr(scoring, "MOST_BEHIND", 4)  # the prompt again for some of the choices
    longer = [replace(row, input_ids=row.input_ids[:2]) for row in rows]
    assert max(len(split(row)) for row in longer) == 2
    wanted = flat([one_by_one(model, row) for row in longer])
    found = flat(rank_choices(placed, None, longer, length_norm=1.0))
    assert found == pytest.approx(wanted, rel=2e-5, abs=2e-5)


def test_every_part_of_a_row_reads_the_slot_of_its_task(monkeypatch: Any) -> None:
    model = untied("qwen3")
    config = AdapterConfig(n_skills=3, n_splits=4, rank=2)
    sites = find_sites(model, config.layout)
    placed = place_model(model, sites)
    adapter = randomise(Adapter(config, sites, task_names=("copy", "sort")))
    adapter.bind(placed.adapted)
    rows = [replace(row, input_ids=row.input_ids[:2], task=row.number % 2) for row in make_rows()]
    wanted = []
    for row in rows:
        with adapter.slots([row.task]):
            wanted += one_by_one(model, row)
    for most in (4, 1024):
        monkeypatch.setattr(scoring, "MOST_BEHIND", most)
        found = flat(rank_choices(placed, adapter, rows, length_norm=1.0))
        assert found == pytest.approx(wanted, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_equals_row_by_row_and_stock_generation(name: str) -> None:
    model = untied(name)
    placed, rows = place_model(model), make_rows()

    def generate(batch: list[EncodedRow], **options: Any) -> list[list[int]]:
        return placed.family.generate(
            model, batch, device=placed.device, max_new_tokens=6, do_sample=False, **options
        )

    for options in ({"num_beams": 1}, {"num_beams": 3}):
        together = generate(rows, **options)
        assert together == [generate([row], **options)[0] for row in rows]
        stock = model.generate(
            input_ids=torch.tensor(rows[0].input_ids)[None],
            attention_mask=torch.ones(1, len(rows[0].input_ids), dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            **options,
        )[0, len(rows[0].input_ids) :].tolist()
        assert together[0] == stock[: len(together[0])]
        assert all(together)


class Words:
    """A stand-in for a tokenizer: ids as words, nothing of them special."""

    def batch_decode(self, ids: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


def test_any_of_several_ends_of_sequence_stops_an_answer_and_none_is_in_it() -> None:
    model = untied("llama", eos_token_id=1, pad_token_id=0)
    placed, rows = place_model(model), make_rows()

    def answers(ends: int | list[int]) -> list[list[str]]:
        model.config.eos_token_id = ends
        texts = generate_answers(placed, None, rows, Words(), beams=1, max_new_tokens=6)
        return [text.split() for text in texts]

    free = answers(1)
    ends = [int(free[0][2]), int(free[1][4])]
    cut = answers([1, *ends])
    for whole, ended in zip(free, cut, strict=True):
        stops = [place for place, word in enumerate(whole) if int(word) in ends]
        assert ended == whole[: min(stops, default=len(whole))]
    assert max(map(len, cut[:2])) <= 4


@pytest.mark.parametrize("name", ["llama", *LEARNED])
def test_rows_beyond_learned_positions_are_refused_others_are_not(name: str) -> None:
    placed = place_model(untied(name))
    assert placed.family.most_positions(placed.model.config) == (64, name in LEARNED)
    fits, too_long = make_rows([(58, (7, 3)), (58, (3, 8))])
    rank_choices(placed, None, [fits], length_norm=1.0)
    if name in LEARNED:
        with pytest.raises(DataError, match="row 1: a prompt and its longest answer are 65 tokens"):
            rank_choices(placed, None, [too_long], length_norm=1.0)
    else:
        rank_choices(placed, None, [too_long], length_norm=1.0)


@torch.no_grad()
def test_the_losses_of_t_few_equal_one_text_at_a_time() -> None:
    model = untied("qwen2")
    placed, rows = place_model(model), make_rows()
    right = torch.tensor([2, 0, 1])
    packed = placed.pack(rows, at_least=(37, 21))
    parts = tfew(
        placed.predictions(packed),
        packed.labels_BD,
        packed.choices_BD,
        right,
        packed.sources,
        n_choices=packed.n_choices,
    )
    for number, row in enumerate(rows):
        nlls = []
        for choice in row.answers:
            ids = torch.tensor(np.concatenate([row.input_ids, choice]))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.input_ids) - 1 : -1]
            nlls.append(F.cross_entropy(logits, torch.tensor(choice), reduction="none"))
        means = torch.stack([nll.mean() for nll in nlls])
        wrong = [nll for place, nll in enumerate(nlls) if place != right[number]]
        unlikely = sum(-torch.log(1.01 - torch.exp(-nll)).sum() for nll in wrong)
        wanted = [
            nlls[right[number]].sum(),
            F.cross_entropy(-means[None], right[number : number + 1]),
            torch.as_tensor(unlikely, dtype=torch.float32),
        ]
        found = [parts.lm.sum[number], parts.mc.sum[number], parts.ul.sum[number]]
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(parts.scores_BC[number, : len(means)], means)


def test_a_batch_holds_no_more_positions_than_its_budget() -> None:
    placed = place_model(untied("llama"))
    for batch in cut_batches(make_rows(), max_tokens=100):
        assert placed.pack(batch).n_positions <= 100
