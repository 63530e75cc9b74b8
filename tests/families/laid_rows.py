"""Adapted models of every family, rows of several tasks, and a step on them, on any device."""

from typing import Any

import numpy as np
import torch
from small_causal import FAMILIES, enlarge, small_causal
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, UMT5Config

from mhr_scale.adapters import Adapter, AdapterConfig, attach, detach
from mhr_scale.config import BackboneConfig
from mhr_scale.families.modes import set_dropout, set_recompute
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.families.table import find_family
from mhr_scale.passes.filled import filled
from mhr_scale.passes.losses import token_losses

CPU = torch.device("cpu")
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
TASKS = ("a", "b", "c")
MHR = AdapterConfig(layout="full", rank=2, n_skills=3, n_splits=2)
ON = BackboneConfig(name="x")


def make(
    name: str,
    settings: BackboneConfig = ON,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Any:
    """A frozen model with the faster parts, that trains without dropout."""
    if name in FAMILIES:
        model = small_causal(name)
    else:
        kind, fields = T5S[name]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = enlarge(AutoModelForSeq2SeqLM.from_config(kind(**SIZES, **fields)))
    model.to(device, dtype)
    find_family(model.config).fuse(model, settings)
    set_dropout(model, 0.0)
    set_recompute(model, settings.recompute)
    return model.train().requires_grad_(False)


def adapted(model: Any, config: AdapterConfig = MHR) -> Adapter:
    """A new adapter in place of the model's own, none of whose tensors is trivial."""
    detach(model)
    return perturb(attach(model, config, tasks=TASKS))


@torch.no_grad()
def perturb(adapter: Adapter) -> Adapter:
    """Add to every tensor what tells tasks, skills and splits apart."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))
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
    """Rows as the model takes them, on its device."""
    family = find_family(model.config)
    packed = family.pack(make_rows() if rows is None else rows, model.config, **options)
    return packed.to(model.device)


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
