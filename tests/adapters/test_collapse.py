"""Averaged and collapsed adapters: one ordinary adapter that computes what the original did."""

import pytest
import torch
from tiny import TASKS, attach_copy, logits, make_adapted, make_t5, tensors_of

from mhr_scale.adapters import AdapterConfig
from mhr_scale.adapters.collapse import average, collapse, soup
from mhr_scale.errors import AdapterError

ROUTED = {
    "Poly": AdapterConfig(n_skills=3, rank=2, alpha=3.0),
    "MHR": AdapterConfig(n_skills=3, n_splits=4, rank=2, alpha=3.0),
    "shared routing": AdapterConfig(n_skills=3, n_splits=4, rank=2, granularity="block"),
    "noisy": AdapterConfig(n_skills=3, n_splits=4, policy="noisy"),
    "straight-through": AdapterConfig(n_skills=3, n_splits=4, policy="straight_through"),
    "fixed": AdapterConfig(n_skills=3, n_splits=4, policy="fixed"),
    "private": AdapterConfig(n_skills=1, rank=2, alpha=3.0, private=True),
    "private MHR": AdapterConfig(n_skills=3, n_splits=4, rank=2, private=True),
    "MHR-(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=4),
    "private (IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=1, private=True),
}
UNROUTED = {
    "LoRA": AdapterConfig(n_skills=1, rank=2, alpha=3.0),
    "(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=1),
    "uniform": AdapterConfig(n_skills=3, rank=2, policy="uniform"),
    "random": AdapterConfig(n_skills=3, rank=2, policy="random"),
}
EVERY = {**ROUTED, **UNROUTED}


def logits_in_a_fresh_model(adapter, n_rows=4):
    model = make_t5().eval()
    return logits(model, attach_copy(model, adapter), [0] * n_rows)


def make(config):
    model, adapter = make_adapted(config, dtype=torch.float32)
    return model.eval(), adapter


@pytest.mark.parametrize("name", ROUTED)
def test_a_collapsed_adapter_gives_the_logits_of_its_task(name):
    model, adapter = make(ROUTED[name])
    expected = logits(model, adapter, [3] * 4)
    found = logits_in_a_fresh_model(collapse(adapter, TASKS[3]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_an_averaged_adapter_gives_the_logits_of_equal_weights(name):
    config = EVERY[name]
    model, adapter = make(config)
    if config.private:
        for parameter in adapter.inventory.parameters():
            parameter.data = parameter.data.mean(1, keepdim=True).expand_as(parameter).contiguous()
    if adapter.routing_logits is not None:
        adapter.routing_logits.data.fill_(1.0)  # above 0: on for straight-through as well
    expected = logits(model, adapter, [2] * 4)
    found = logits_in_a_fresh_model(average(make(config)[1]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROUTED)
def test_the_result_is_one_ordinary_adapter_of_the_same_rank(name):
    _, adapter = make(ROUTED[name])
    config = adapter.config
    for single in (average(adapter), collapse(adapter, "sort")):
        assert single.config.method in ("LoRA", "(IA)3")
        assert (single.config.rank, single.config.alpha) == (config.rank, config.alpha)
        assert single.routing_logits is None


def test_the_result_is_named_after_what_it_is():
    _, adapter = make(ROUTED["MHR"])
    names = (average(adapter).task_names, collapse(adapter, "sort").task_names)
    assert names == (("average",), ("sort",))


@pytest.mark.parametrize("name", ["MHR", "private", "LoRA", "(IA)3"])
def test_averaging_leaves_the_adapter_as_it_was(name):
    _, adapter = make(EVERY[name])
    before = tensors_of(adapter)
    for parameter in average(adapter).parameters():
        parameter.data.zero_()
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors_of(adapter).items())


def test_an_average_of_one_skill_is_that_skill():
    _, adapter = make(UNROUTED["LoRA"])
    torch.testing.assert_close(tensors_of(average(adapter)), tensors_of(adapter))


@pytest.mark.parametrize("name", UNROUTED)
def test_a_method_without_routing_of_its_own_points_to_the_average(name):
    _, adapter = make(UNROUTED[name])
    with pytest.raises(AdapterError, match="collapse its average instead"):
        collapse(adapter, "sort")


@pytest.mark.parametrize("name", ["MHR", "LoRA"])
def test_collapsing_an_unknown_task_suggests_a_known_one(name):
    _, adapter = make(EVERY[name])
    with pytest.raises(AdapterError, match="did you mean 'reverse'"):
        collapse(adapter, "revrese")


@pytest.mark.parametrize("name", [name for name in ROUTED if not name.startswith("private")])
def test_routing_annealed_to_uniform_is_the_average(name):
    model, adapter = make(ROUTED[name])
    ids = torch.arange(2, 8).repeat(4, 1)
    with torch.no_grad(), adapter.slots([0, 1, 2, 3], uniform_share=1.0):
        annealed = model(input_ids=ids, decoder_input_ids=ids).logits
    model = make_t5().eval()
    mean = attach_copy(model, average(adapter))
    with torch.no_grad(), mean.slots([0] * 4):
        averaged = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(annealed, averaged, rtol=1e-5, atol=1e-5)


def test_a_soup_is_the_mean_of_the_chosen_tasks_pairs():
    _, adapter = make(ROUTED["private"])
    found = tensors_of(soup(adapter, [TASKS[3], TASKS[1]]))
    one, other = (tensors_of(collapse(adapter, TASKS[number])) for number in (1, 3))
    expected = {name: (one[name] + other[name]) / 2 for name in one}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["MHR", "LoRA", "private MHR"])
def test_a_soup_needs_private_adapters_of_one_skill(name):
    _, adapter = make(EVERY[name])
    with pytest.raises(AdapterError, match="a soup is made of private adapters"):
        soup(adapter, [TASKS[0]])
