"""Masks as a GPU's attention kernels want them: the same numbers, in rows that begin at 8s."""

from itertools import product
from typing import Any

import pytest
import torch
from small_causal import enlarge, make_rows, small_causal
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, T5Config

from mhr_scale.config import BackboneConfig
from mhr_scale.families import aligned
from mhr_scale.families.aligned import ALIGNED
from mhr_scale.families.table import find_family

T5 = {
    **{"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0, "tie_word_embeddings": False},
}


def make(name: str) -> Any:
    """A frozen model with the faster parts."""
    if name == "t5":
        torch.manual_seed(1)
        model = enlarge(AutoModelForSeq2SeqLM.from_config(T5Config(**T5)))
    else:
        model = small_causal(name)
    find_family(model.config).fuse(model, BackboneConfig(name="x"))
    return model


def is_aligned(mask: torch.Tensor) -> bool:
    """As torch's `aligned_tensor` and the kernel's `check_supported` ask."""
    *strides, last = mask.stride()
    return last == 1 and not any(number % ALIGNED for number in (*strides, mask.storage_offset()))


def pack(name: str, way: str, model: Any) -> Any:
    family = find_family(model.config)
    if way == "shared":
        return family.pack_shared(make_rows(), model.config)
    return family.pack(make_rows(), model.config, pad_multiple=1, is_flat=way == "flat")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *product(("llama", "mistral", "gemma3"), ("padded", "flat", "shared")),
        *product(("t5",), ("padded", "flat", "generated")),
    ],
)
def test_masks_are_aligned_once_for_all_layers(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, attend = make(name), F.scaled_dot_product_attention
    seen: list[torch.Tensor] = []

    def attend_and_look(*heads: Any, attn_mask: Any = None, **options: Any) -> Any:
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            seen.append(attn_mask)
        return attend(*heads, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_and_look)

    @torch.no_grad()
    def run() -> Any:
        family = find_family(model.config)
        if way == "generated":
            rows, options = make_rows(), {"max_new_tokens": 5, "do_sample": False}
            return family.generate(model, rows, device=torch.device("cpu"), **options)
        packed = pack(name, way, model)
        with packed.in_use():
            return family.predictions(model, packed)

    expected = run()
    if way != "shared":  # whose rows are aligned anyway
        assert not all(map(is_aligned, seen))
    seen.clear()
    monkeypatch.setattr(aligned, "is_on_cpu", lambda _: False)
    found = run()
    assert all(map(is_aligned, seen))
    assert found == expected if way == "generated" else torch.equal(found, expected)


def test_masks_are_put_together_and_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [torch.randn(shape) for shape in ((2, 3, 5, 7), (1, 1, 1, 1), (2, 1, 3, 16))]
    for is_on_cpu in (True, False):
        monkeypatch.setattr(aligned, "is_on_cpu", lambda _, answer=is_on_cpu: answer)
        joined = aligned.join(masks)
        assert joined.numel() == sum(mask.numel() for mask in masks) + (0 if is_on_cpu else 37)
        parts = aligned.split(joined, [mask.shape for mask in masks])
        assert all(map(torch.equal, parts, masks))
        assert is_on_cpu or all(map(is_aligned, parts))
