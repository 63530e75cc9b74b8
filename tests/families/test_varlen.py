"""The variable-length kernel of GPUs is called as rows laid flat need it (restated on the CPU)."""

from dataclasses import replace

import pytest
import torch
from small_causal import make_rows, small_causal
from torch.nn.attention import varlen as torch_varlen

from mhr_scale.config import BackboneConfig
from mhr_scale.families import varlen
from mhr_scale.families.causal import CAUSAL
from mhr_scale.passes.losses import token_losses


def restated(q, k, v, bounds_q, bounds_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """The kernel by its documentation: queries (T, H, D) see keys of their own sequence."""
    assert torch.equal(bounds_q, bounds_k)
    assert bounds_q.dtype == torch.int32
    assert int(bounds_q.diff().max()) == max_q == max_k
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    assert right == 0
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    out = torch.zeros_like(q)
    for start, stop in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True):
        places = torch.arange(stop - start)
        distance = places[:, None] - places
        is_open = (distance >= 0) & ((left < 0) | (distance <= left))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * scale
        weights = scores.masked_fill(~is_open, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, v[start:stop])
    return out


@pytest.fixture
def calls(monkeypatch):
    """Every attention of rows that are one text each goes to the restated kernel."""
    seen = []

    def attend(*args, **options):
        seen.append(options["window_size"])
        return restated(*args, **options)

    monkeypatch.setattr(torch_varlen, "varlen_attn", attend)
    monkeypatch.setattr(
        varlen, "fits", lambda module, flat, query, *, dropout, options: flat.is_causal
    )
    return seen


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
