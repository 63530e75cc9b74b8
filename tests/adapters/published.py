"""Adapters as the reference implementation publishes them."""

import torch
from tiny import make_adapted

from mhr_scale.adapters import AdapterConfig, artefact

MHR = AdapterConfig(n_skills=3, n_splits=4, rank=2)
KEY = "encoder.block.0.layer.0.SelfAttention.k"
VALUE = "encoder.block.0.layer.0.SelfAttention.v"
TABLE = "selector.module_logits"
SIDES = {"A": "lora_a", "B": "lora_b", "l": "multi_lora_b"}


def make(config):
    return make_adapted(config, dtype=torch.float32)[1]


def publish(adapter, *, everywhere=False):
    """The adapter's tensors as the reference names and shapes them.

    A table shared by several linears stands under the first, or under each of them.
    """
    stored = artefact.named_tensors(adapter)
    found = {}
    for name, tensor in stored.items():
        linear, _, side = name.rpartition(".")
        if side in SIDES:
            whole = {1: tensor, 3: tensor[0, 0]}[1 if adapter.config.is_routed else 3]
            found[f"{linear}.{SIDES[side]}"] = whole.clone()
    seen = set()
    for site in adapter.sites if adapter.routing_logits is not None else ():
        group = site.routing_group(adapter.config.granularity, adapter.config.block_span)
        if everywhere or group not in seen:
            found[f"{site.name}.{TABLE}"] = stored[f"{group}.routing_logits"].flatten(1)
        seen.add(group)
    return found


def store(tensors, folder, *, prefix="model.", **settings):
    """A Lightning checkpoint, as the reference writes it."""
    path = folder / "best.ckpt"
    tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": tensors, "hyper_parameters": settings, "epoch": 3}, path)
    return path


def assert_same(found, expected):
    found, expected = artefact.named_tensors(found), artefact.named_tensors(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
