"""A micro step of rows laid flat asks the host to wait no more than the frozen backbone does."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from placed import place_model
from small_causal import small_causal
from small_t5 import small_t5
from tiny import Recorder
from torch.utils._python_dispatch import TorchDispatchMode

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.adapters.wrapping import adapters_off
from mhr_scale.config import BackboneConfig
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.table import find_family
from mhr_scale.passes.filled import filled
from mhr_scale.passes.validation import forward

MODELS = {"T5": small_t5, "Llama": lambda: small_causal("llama")}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def make_step(make):
    """A fused backbone, an MHR adapter over it, and the packing of rows of three tasks."""
    model = make()
    family = find_family(model.config)
    family.fuse(model, BackboneConfig(name="x"))
    sites = find_sites(model, "full")
    config = AdapterConfig(n_skills=4, n_splits=2)
    adapter = Adapter(config, sites, task_names=["one", "two", "three"], row_gradients=True)
    placed = place_model(model, sites)
    adapter.bind(placed.adapted)
    draw = np.random.default_rng(0)
    lengths = ((11, 3, 0), (7, 4, 2), (13, 2, 0), (5, 6, 1))
    rows = [
        EncodedRow(draw.integers(5, 60, n), (draw.integers(5, 60, m),), task=task)
        for n, m, task in lengths
    ]
    return placed, adapter, lambda is_flat: family.pack(rows, model.config, is_flat=is_flat)


def run_frozen(placed, packed):
    with torch.no_grad(), adapters_off(placed.model), packed.in_use():
        forward(placed, packed)


def run_step(placed, adapter, packed):
    with filled(adapter, packed) as slots:
        slots.backward(forward(placed, packed).sum.sum())


@each_model
def test_a_packed_step_waits_as_often_as_the_frozen_backbone_and_uploads_less_than_padded(make):
    placed, adapter, pack = make_step(make)
    run_step(placed, adapter, pack(True))  # the first one finds out who uses slots
    waits, uploads = [], []
    for packed in map(pack, (True, False)):
        with Recorder() as frozen:
            run_frozen(placed, packed)
        with Recorder() as ours:
            run_step(placed, adapter, packed)
        waits.append([one.count(Recorder.SYNCS) for one in (ours, frozen)])
        # what is made of Python's numbers: copied to a device from memory that is not pinned
        uploads.append(ours.count(["lift_fresh"]))
        assert frozen.count(["lift_fresh"]) == 0
    assert waits[0] == [0, 0]
    assert waits[1][0] == waits[1][1]  # transformers reads T5's mask
    assert uploads == [2, 3]  # the routing rows of the tasks, those of the gradient; slots by row


class Copies(TorchDispatchMode):
    """Copies from the host to a device inside the block, and whether the host waits for them."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run the operation; note it if it takes a tensor of the host to the device."""
        result = operation(*args, **(kwargs or {}))
        on_host = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_cpu]
        is_moved = isinstance(result, torch.Tensor) and result.is_meta
        if is_moved and any(tensor.dim() for tensor in on_host):
            assert operation.overloadpacket.__name__ == "_to_copy"
            self.waits.append(not (kwargs or {}).get("non_blocking"))
        return result


@each_model
def test_only_packed_rows_are_copied_to_the_device_and_without_waiting(make, monkeypatch):
    """The device `meta`: reading any of its numbers raises. It has no autocast."""
    placed, adapter, pack = make_step(make)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    for module in (placed.model, adapter):
        module.to("meta")
    on_host = pack(True)
    with Copies() as moving:
        packed = on_host.to(torch.device("meta"))
    assert moving.waits
    assert not any(moving.waits)
    with Copies() as running:
        run_step(placed, adapter, packed)
    assert running.waits == []
