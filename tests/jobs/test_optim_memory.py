"""What clipping and an update make on the way: little, and nothing that changes a bit."""

import weakref
from dataclasses import replace

import pytest
import torch
from adapters.tiny import tensors_of
from stacked_jobs import (
    CLIP_NORM,
    N_JOBS,
    OPTIMIZERS,
    SITES,
    STEPS,
    assert_same,
    run_wave,
    start,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhr_scale.adapters import Adapter, AdapterConfig
from mhr_scale.jobs.job_optim import clip_jobs, make_job_optimizer
from mhr_scale.training.optim import (
    AT_ONCE,
    at_once,
    clip_gradients,
    gradient_norm,
    make_optimizer,
)


class Peak(TorchDispatchMode):
    """The most bytes that live at once of what is made inside the block."""

    def __init__(self, known):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run the operation and count its results."""
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return result


@pytest.mark.parametrize("kind", ["MHR", "(IA)3", "routing only"])
@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_linears_are_updated_a_few_at_a_time_bit_for_bit(monkeypatch, kind, optim):
    found = []
    for most in (2**18, 0):
        monkeypatch.setitem(AT_ONCE, "cpu", most)
        alones, wave, optimizer = start(kind, optim, dtype=torch.float32)
        norms = run_wave(wave, optimizer, alones, range(N_JOBS), range(STEPS))
        found.append({"norms": norms, **tensors_of(wave)})
    assert_same(*found)


def test_no_linear_is_left_out_or_alone():
    """Of 1 to 7 linears of 2**17 numbers each two are taken at once, or the last three."""
    ranges = [at_once(torch.empty(n_linears, 2**17)) for n_linears in range(1, 8)]
    stops = [[linears.stop for linears in taken] for taken in ranges]
    assert stops == [[1], [2], [3], [2, 4], [2, 5], [2, 4, 6], [2, 4, 7]]
    starts = [[linears.start for linears in taken] for taken in ranges]
    assert starts == [[0, *before[:-1]] for before in stops]


@pytest.mark.parametrize(
    ("name", "is_wave", "of_clip", "of_step"),
    [
        ("adafactor", True, 16, 8),
        ("adafactor, scale_parameter", True, 16, 8),
        ("adamw, decay", True, 16, 4),
        ("adafactor", False, 0, 8),
        ("adamw, decay", False, 0, 0),
    ],
)
def test_clipping_and_a_step_make_a_few_bytes_of_two_linears(
    monkeypatch, name, is_wave, of_clip, of_step
):
    """Bytes a number of the two of 16 linears that are worked on at once; sums are few beside."""
    monkeypatch.setitem(AT_ONCE, "cpu", 0)
    sites = [replace(SITES[0], name=f"{n}", in_features=1024, out_features=1024) for n in range(16)]
    config = AdapterConfig(n_skills=4, n_splits=2, private=is_wave)
    adapter = Adapter(config, tuple(sites), task_names=["one", "two", "three"])
    optim = OPTIMIZERS[name]
    make = make_job_optimizer if is_wave else make_optimizer
    optimizer = make(adapter, optim)

    def clip():
        if is_wave:
            clip_jobs(adapter, CLIP_NORM)
        else:
            norm = gradient_norm(adapter.parameters())
            clip_gradients(adapter.parameters(), norm, CLIP_NORM)

    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # it makes the optimizer's state
    state = (value for part in optimizer.state.values() for value in part.values())
    known = [value for value in state if isinstance(value, torch.Tensor)]
    known += [tensor for p in adapter.parameters() for tensor in (p, p.grad)]
    n_numbers = max(parameter[:2].numel() for parameter in adapter.inventory.parameters())
    for work, bytes_each in ((clip, of_clip), (optimizer.step, of_step)):
        with Peak(known) as peak:
            work()
        assert bytes_each <= peak.most / n_numbers < bytes_each + 0.5
