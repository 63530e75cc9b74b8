"""Adapters that PEFT can hold, and their folders: written, read, changed and compared."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import make_adapted

from mhr_scale.adapters import AdapterConfig, artefact, peft_folders
from mhr_scale.adapters.collapse import average, collapse

# of transformers and torch, whatever adapter is loaded
OTHERS = (".is_gradient_checkpointing. is deprecated", ".torch.jit.script_method. is deprecated")
WITHOUT_OTHERS = pytest.mark.filterwarnings(*(f"ignore:{message}" for message in OTHERS))

GATED = {}
UNGATED = {"feed_forward_proj": "relu"}
MHR = AdapterConfig(n_skills=3, n_splits=4, rank=2, alpha=3.0)
LORA = AdapterConfig(n_skills=1, rank=2, alpha=3.0)
IA3 = AdapterConfig(kind="ia3", layout="light", n_skills=1)
POLY = AdapterConfig(n_skills=3, rank=2)
SINGLES = {
    "LoRA": (LORA, None),
    "light LoRA": (replace(LORA, layout="light"), None),
    "attention LoRA": (replace(LORA, layout="attention"), None),
    "alpha of 2.5": (replace(LORA, alpha=2.5), None),
    "averaged MHR": (MHR, average),
    "averaged light MHR": (replace(MHR, layout="light"), average),
    "collapsed MHR": (MHR, lambda adapter: collapse(adapter, "sort")),
    "averaged private LoRAs": (replace(LORA, private=True), average),
    "(IA)3": (IA3, None),
    "full (IA)3": (replace(IA3, layout="full"), None),
    "averaged MHR-(IA)3": (replace(IA3, n_skills=3, n_splits=4), average),
}
ROUTED = {
    "Poly": POLY,
    "MHR": replace(MHR, alpha=1.0),
    "light MHR, alpha of 3": replace(MHR, layout="light"),
    "noisy MHR": replace(MHR, alpha=1.0, policy="noisy", temperature=0.5),
}
QUERY = "encoder.block.0.layer.0.SelfAttention.q"
STORED = f"base_model.model.{QUERY}"


def make(config, change=None, **backbone):
    _, adapter = make_adapted(config, dtype=torch.float32, **backbone)
    return change(adapter) if change else adapter


def write(adapter, folder, base_model=None):
    """Write with the function that fits the adapter."""
    if adapter.config.is_routed:
        return peft_folders.write_peft_poly(adapter, folder, base_model=base_model)
    kinds = {"lora": peft_folders.write_peft_lora, "ia3": peft_folders.write_peft_ia3}
    return kinds[adapter.config.kind](adapter, folder, base_model=base_model)


def read(folder):
    return peft_folders.open_adapter(folder)[1]


def assert_same(found, expected):
    """Bit for bit the same tensors under the same names."""
    found, expected = artefact.named_tensors(found), artefact.named_tensors(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def edit(folder, **fields):
    """Change fields of the configuration."""
    config = json.loads((folder / peft_folders.CONFIG).read_text())
    (folder / peft_folders.CONFIG).write_text(json.dumps({**config, **fields}))
