"""Rows of several tasks laid flat are what they are padded: in float32, over every family.

Losses of every target, logits and gradients of the adapter, whatever is beside a row.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from small_causal import FAMILIES, enlarge, small_causal
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, UMT5Config

from mhr_scale.adapters import Adapter, AdapterConfig, attach, detach
from mhr_scale.config import BackboneConfig
from mhr_scale.families.modes import set_dropout, set_recompute
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.families.t5gemma import T5GEMMA
from mhr_scale.families.table import find_family
from mhr_scale.passes.filled import filled
from mhr_scale.passes.losses import token_losses

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

SIZES = {
    **{"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0, "dropout_rate": 0.0, "tie_word_embeddings": False},
}
T5S: dict[str, Any] = {
    "t5 v1.0": (T5Config, {"feed_forward_proj": "relu"}),
    "t5 v1.1": (T5Config, {"feed_forward_proj": "gated-gelu"}),
    "mt5": (MT5Config, {"feed_forward_proj": "gated-gelu"}),
    "umt5": (UMT5Config, {"feed_forward_proj": "gated-gelu"}),
}
#: Families whose attention takes padded rows only.
PADDED_ONLY = ("falcon", "falcon new", "gptj", "umt5")
FLAT = [name for name in (*FAMILIES, *T5S) if name not in PADDED_ONLY]
#: One of each kind: grouped heads, capped scores under a window, positions looked up, two stacks.
SOME = ("llama", "gemma2", "gpt2", "t5 v1.1")
TASKS = ("a", "b", "c")
MHR = AdapterConfig(layout="full", rank=2, n_skills=3, n_splits=2)
ON = BackboneConfig(name="x")


def make(name: str, settings: BackboneConfig = ON) -> Any:
    """A frozen model with the faster parts, that trains without dropout."""
    if name in FAMILIES:
        model = small_causal(name)
    else:
        kind, fields = T5S[name]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = enlarge(AutoModelForSeq2SeqLM.from_config(kind(**SIZES, **fields)))
    find_family(model.config).fuse(model, settings)
    set_dropout(model, 0.0)
    return model.train().requires_grad_(False)


@cache
def made(name: str) -> Any:
    return make(name)


def adapted(model: Any, config: AdapterConfig = MHR) -> Adapter:
    """A new adapter in place of the model's own, none of whose tensors is trivial."""
    detach(model)
    adapter = attach(model, config, tasks=TASKS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def make_rows() -> list[EncodedRow]:
    """Rows of three tasks that take turns, with one answer or several, some beyond the windows."""
    draw = np.random.default_rng(0)
    shapes = ((11, (3, 1, 4), 0), (7, (2,), 2), (13, (1, 9), 2), (21, (5,), 1), (3, (2, 2), 0))
    return [
        EncodedRow(
            draw.integers(5, 90, n),
            tuple(draw.integers(5, 90, m) for m in answers),
            task=task,
            number=number,
        )
        for number, (n, answers, task) in enumerate(shapes)
    ]


def pack(model: Any, rows: list[EncodedRow] | None = None, **options: Any) -> Packed:
    family = find_family(model.config)
    return family.pack(make_rows() if rows is None else rows, model.config, **options)


def step(
    model: Any, adapter: Adapter, packed: Packed, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses of all target positions, the logits there, gradients of the summed losses."""
    family = find_family(model.config)
    adapter.zero_grad(set_to_none=True)
    seeds = [7 + row.number for row in packed.rows]
    with filled(adapter, packed, seeds=seeds) as slots:
        predicted = family.predictions(model, packed)
        losses = token_losses(
            predicted, packed.labels_BD, packed.sources, label_smoothing=label_smoothing
        )
        slots.backward(losses.sum())
    with torch.no_grad(), filled(adapter, packed, seeds=seeds):
        logits = family.logits(model, packed)
    found = {
        name: p.grad.to_dense() for name, p in adapter.named_parameters() if p.grad is not None
    }
    is_target = (packed.labels_BD >= 0)[..., None]
    return losses.detach(), logits.where(is_target, 0.0), found


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
    model, expected_of = make(name), made(name)
    set_recompute(model, mode)
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
