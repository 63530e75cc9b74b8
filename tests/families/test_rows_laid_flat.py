"""Rows of several tasks laid flat are what they are padded: in float32, over every family.

Losses of every target, logits and gradients of the adapter, whatever is beside a row.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from laid_rows import FLAT, ON, PADDED_ONLY, T5S, adapted, make, make_rows, pack, step
from small_causal import FAMILIES

from mhr_scale.adapters import AdapterConfig
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.t5gemma import T5GEMMA
from mhr_scale.families.table import find_family
from mhr_scale.passes.filled import filled

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

#: One of each kind: grouped heads, capped scores under a window, positions looked up, two stacks.
SOME = ("llama", "gemma2", "gpt2", "t5 v1.1")


@cache
def made(name: str) -> Any:
    return make(name)


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    assert found[2].keys() == expected[2].keys()
    for name, theirs in expected[2].items():
        assert bool(theirs.any()), name
        assert (found[2][name] - theirs).abs().max() <= 5e-6 * theirs.abs().max(), name


def test_who_cannot_is_known_by_name() -> None:
    refused = {
        name: find_family(made(name).config).cannot_lay(made(name)) for name in (*FAMILIES, *T5S)
    }
    assert tuple(name for name, why in refused.items() if why) == PADDED_ONLY
    assert T5GEMMA.cannot_lay(None) == "attention of T5Gemma takes padded rows only"
    assert refused["gptj"] == "attention of a gptj takes padded rows only"
    slow = replace(ON, fused_attention=False)
    for name in ("llama", "t5 v1.1"):
        model = make(name, slow)
        assert find_family(model.config).cannot_lay(model) == (
            "it needs backbone.fused_attention: true"
        )


@pytest.mark.parametrize("name", FLAT)
def test_losses_logits_and_gradients_are_those_of_padded_rows(name: str) -> None:
    model = made(name)
    adapter = adapted(model)
    expected = step(model, adapter, pack(model), label_smoothing=0.1)
    flat = pack(model, is_flat=True)
    assert flat.n_padding == 0
    assert_same(step(model, adapter, flat, label_smoothing=0.1), expected)
    filled_up = pack(model, is_flat=True, token_multiple=150, at_least=(30, 0))
    assert filled_up.n_padding > 0
    assert_same(step(model, adapter, filled_up, label_smoothing=0.1), expected)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_blocks_that_are_computed_anew_find_the_same_rows(name: str, mode: str) -> None:
    model, expected_of = make(name, replace(ON, recompute=mode)), made(name)
    expected = step(expected_of, adapted(expected_of), pack(expected_of))
    assert_same(step(model, adapted(model), pack(model, is_flat=True)), expected)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=2),
        AdapterConfig(layout="full", rank=1, n_skills=3, policy="random"),
        AdapterConfig(layout="full", rank=2, n_skills=3, n_splits=2, policy="noisy"),
        AdapterConfig(layout="attention", rank=16, n_skills=1),
    ],
    ids=["ia3", "random", "noisy", "lora"],
)
def test_slots_of_every_kind_are_found(name: str, config: AdapterConfig) -> None:
    model = made(name)
    adapter = adapted(model, config)
    expected = step(model, adapter, pack(model))
    assert_same(step(model, adapter, pack(model, is_flat=True)), expected)


@pytest.mark.parametrize("name", SOME)
def test_rows_of_one_length_are_flat_as_they_are(name: str) -> None:
    draw = np.random.default_rng(3)
    rows = [
        EncodedRow(draw.integers(5, 90, 12), (draw.integers(5, 90, 5),), task=task)
        for task in (0, 1, 1)
    ]
    model = made(name)
    adapter = adapted(model)
    packed = pack(model, rows, is_flat=True, pad_multiple=4)
    assert packed.flat is not None
    assert all(stream.places_N is None for stream in packed.flat.streams)
    expected = step(model, adapter, pack(model, rows))
    assert_same(step(model, adapter, packed), expected)


@pytest.mark.parametrize("name", SOME)
def test_one_answer_is_the_same_without_those_beside_it_and_without_gradients(name: str) -> None:
    model, rows = made(name), make_rows()
    adapter, family = adapted(model), find_family(made(name).config)
    packed = pack(model, rows, is_flat=True)
    with torch.inference_mode(), filled(adapter, packed, seeds=[0] * len(rows)):
        together = family.logits(model, packed)
    for number, row in enumerate(rows):
        for start, answer in zip(packed.starts[number], row.answers, strict=True):
            alone = pack(model, [replace(row, answers=(answer,))], is_flat=True)
            with torch.inference_mode(), filled(adapter, alone, seeds=[0]):
                expected = family.logits(model, alone)[0]
            found = together[number, start : start + len(answer)]
            assert (found - expected).abs().max() <= 1e-6 * together.abs().max()
