"""Slots stay what they are while activations are recomputed, by either kind of checkpointing."""

import pytest
import torch
from tiny import Recorder, gradients, make_adapted, make_batch

from mhr_scale.adapters import AdapterConfig

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")

TASK_IDS = (2, 0, 2, 1)
KINDS = {"non_reentrant": False, "reentrant": True}
CONFIGS = {
    "MHR": AdapterConfig(n_skills=3, n_splits=4, rank=2),
    "runs": AdapterConfig(n_skills=3, n_splits=4, rank=11),
    "noisy": AdapterConfig(n_skills=3, n_splits=4, rank=2, policy="noisy"),
    "random": AdapterConfig(n_skills=3, rank=2, policy="random"),
    "private": AdapterConfig(n_skills=1, rank=2, private=True),
    "ia3": AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=4),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def make_recomputing(config, kind):
    model, adapter = make_adapted(config)
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": KINDS[kind]}
    )
    model.enable_input_require_grads()
    return model, adapter


def test_gradients_equal_those_without_recomputation(config, kind):
    seeds = {"seeds": [11, 12, 13, 14]}
    expected = gradients(*make_adapted(config), TASK_IDS, **seeds)
    found = gradients(*make_recomputing(config, kind), TASK_IDS, **seeds)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_every_linear_inside_a_block_runs_twice(kind):
    model, adapter = make_recomputing(CONFIGS["MHR"], kind)
    calls = []
    adapter.linears[0].register_forward_hook(lambda *_: calls.append(1))
    gradients(model, adapter, TASK_IDS)
    assert len(calls) == 2


@pytest.mark.parametrize("policy", ["noisy", "random"])
def test_noise_is_drawn_before_the_forward_pass_and_never_again(policy, kind):
    model, adapter = make_recomputing(CONFIGS[policy], kind)
    with adapter.off(), Recorder() as bare:
        model(**make_batch(4))
    with adapter.slots(TASK_IDS) as slots, Recorder() as recorder:
        slots.backward(model(**make_batch(4)).loss)
    assert recorder.count(Recorder.DRAWS) == bare.count(Recorder.DRAWS)


def test_noisy_slots_draw_when_they_are_filled():
    _, adapter = make_adapted(CONFIGS["noisy"])
    with Recorder() as recorder:
        adapter.slots(TASK_IDS)
    assert recorder.count(Recorder.DRAWS) > 0


def test_mixing_is_not_repeated_by_recomputation(kind):
    model, adapter = make_recomputing(CONFIGS["MHR"], kind)
    with adapter.slots(TASK_IDS) as slots, Recorder() as recorder:
        slots.backward(model(**make_batch(4)).loss)
    # `sigmoid` of the routing logits runs when slots are filled; the backbone has none
    assert recorder.count(["sigmoid"]) == 0


def test_an_evaluation_between_two_recomputed_steps_changes_nothing(kind):
    model, adapter = make_recomputing(CONFIGS["MHR"], kind)
    expected = gradients(model, adapter, TASK_IDS)
    model.eval()
    with torch.no_grad(), adapter.slots([3, 3, 1, 0]):
        model(**make_batch(4))
    model.train()
    torch.testing.assert_close(gradients(model, adapter, TASK_IDS), expected, rtol=0, atol=0)
