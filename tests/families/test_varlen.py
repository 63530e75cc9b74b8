"""The variable-length kernel of GPUs is called as rows laid flat need it (restated on the CPU)."""

from dataclasses import replace

import pytest
import torch
from restated_varlen import counted
from small_causal import make_rows, small_causal

from mhr_scale.config import BackboneConfig
from mhr_scale.families import varlen
from mhr_scale.families.causal import CAUSAL
from mhr_scale.passes.losses import token_losses


@pytest.fixture
def calls():
    """Every attention of rows that are one text each goes to the restated kernel."""
    with counted(is_restated=True) as seen:
        yield seen


def losses_of(model, rows, *, is_flat, token_multiple=1):
    packed = CAUSAL.pack(rows, model.config, is_flat=is_flat, token_multiple=token_multiple)
    with torch.no_grad(), packed.in_use():
        return token_losses(CAUSAL.predictions(model, packed), packed.labels_BD, packed.sources)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "phi", "opt"])
@pytest.mark.parametrize("token_multiple", [1, 200])
def test_rows_of_one_answer_are_those_of_padded_rows(calls, name, token_multiple):
    model = small_causal(name).eval()
    CAUSAL.fuse(model, BackboneConfig(name="x"))
    rows = [replace(row, answers=row.answers[:1]) for row in make_rows()]
    expected = losses_of(model, rows, is_flat=False)
    assert not calls
    found = losses_of(model, rows, is_flat=True, token_multiple=token_multiple)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == model.config.num_hidden_layers
    window = getattr(model.config, "sliding_window", None)
    assert ((window or 0) - 1, 0) in calls or not window


def test_rows_of_several_answers_keep_their_masks(calls):
    model = small_causal("llama").eval()
    CAUSAL.fuse(model, BackboneConfig(name="x"))
    expected = losses_of(model, make_rows(), is_flat=False)
    found = losses_of(model, make_rows(), is_flat=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not calls


def test_a_cpu_has_no_such_kernel():
    model = small_causal("llama")
    packed = CAUSAL.pack([make_rows()[0]], model.config, is_flat=True)
    module, query = model.model.layers[0].self_attn, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    assert not varlen.fits(module, packed.flat, query, dropout=0.0, options={})
