"""The optimizer of an adapter: its groups, its steps, its rates, annealing."""

import math

import pytest
import torch
from torch import nn

from mhr_scale.adapters import Adapter, AdapterConfig
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.adapters.sites import Site
from mhr_scale.config import OptimConfig, ScheduleConfig
from mhr_scale.errors import RunError
from mhr_scale.training.optim import (
    check_states,
    has_row_gradients,
    make_optimizer,
    rate_factor,
    set_rates,
    uniform_share,
)

TASKS = ("copy", "reverse", "sort", "count", "swap")


def make_adapter(optimizer="adafactor", **options) -> Adapter:
    """An adapter for an optimizer of this name."""
    site = Site(name="x", in_features=4, out_features=6, stack="encoder", block=0, sublayer=0)
    config = AdapterConfig(**{"n_skills": 3, "n_splits": 2, "rank": 2, **options})
    row_gradients = has_row_gradients(OptimConfig(name=optimizer))
    adapter = Adapter(config, (site,), task_names=TASKS, row_gradients=row_gradients)
    base = nn.Linear(4, 6).requires_grad_(False)
    adapter.linears.append(AdaptedLinear(base, "x"))
    return adapter


def step_once(adapter, optimizer, task_ids):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(len(task_ids), 3, 4, generator=generator)
    for _ in range(2):  # B is zero before the first update, and with it the gradient of A
        optimizer.zero_grad()
        with adapter.slots(task_ids) as slots:
            slots.backward(adapter.linears[0](x).square().sum())
        optimizer.step()


def groups_by_name(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_inventory_and_routing_have_rates_of_their_own(name):
    adapter = make_adapter(name)
    optimizer = make_optimizer(adapter, OptimConfig(name=name, lr=0.01, routing_lr=0.5))
    groups = groups_by_name(optimizer)
    assert {name: group["lr"] for name, group in groups.items()} == {
        "inventory": 0.01,
        "routing": 0.5,
    }
    assert groups["routing"]["params"] == [adapter.routing_logits]


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_only_the_inventory_decays(name):
    optimizer = make_optimizer(make_adapter(name), OptimConfig(name=name, weight_decay=0.2))
    decays = {name: group["weight_decay"] for name, group in groups_by_name(optimizer).items()}
    assert decays == {"inventory": 0.2, "routing": 0.0}


LORA = {"n_skills": 1, "n_splits": 1}


@pytest.mark.parametrize(
    "options",
    [{"policy": "fixed"}, {"policy": "uniform"}, {"policy": "random"}, LORA],
    ids=["fixed", "uniform", "random", "LoRA"],
)
def test_without_trainable_routing_there_is_one_group(options):
    optimizer = make_optimizer(make_adapter(**options), OptimConfig())
    assert list(groups_by_name(optimizer)) == ["inventory"]


def test_adafactor_groups_say_what_a_separate_tensor_is():
    groups = groups_by_name(make_optimizer(make_adapter(), OptimConfig()))
    assert (groups["inventory"]["lead"], groups["inventory"]["routing"]) == (1, False)
    assert groups["routing"]["routing"]


@pytest.mark.parametrize("options", [{}, LORA], ids=["MHR", "LoRA"])
def test_each_task_s_private_tensors_are_separate(options):
    adapter = make_adapter(private=True, **options)
    groups = groups_by_name(make_optimizer(adapter, OptimConfig()))
    assert groups["inventory"]["lead"] == 2


@pytest.mark.parametrize(("name", "is_sparse"), [("adafactor", True), ("adamw", False)])
def test_only_adafactor_gets_sparse_routing_gradients(name, is_sparse):
    adapter = make_adapter(name)
    step_once(adapter, make_optimizer(adapter, OptimConfig(name=name)), ["sort", "copy"])
    assert adapter.routing_logits.grad.is_sparse == is_sparse


def test_adamw_takes_no_adapter_of_sparse_routing_gradients():
    with pytest.raises(AssertionError, match="AdamW moves every row"):
        make_optimizer(make_adapter("adafactor"), OptimConfig(name="adamw"))


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_step_moves_every_trainable_tensor(name):
    adapter = make_adapter(name)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    step_once(adapter, make_optimizer(adapter, OptimConfig(name=name)), ["sort", "copy"])
    moved = {name: not torch.equal(p, before[name]) for name, p in adapter.named_parameters()}
    assert moved == dict.fromkeys(before, True)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_the_state_that_a_step_leaves_is_a_good_one(name):
    adapter = make_adapter(name)
    optimizer = make_optimizer(adapter, OptimConfig(name=name))
    check_states(optimizer, adapter, place="here")
    step_once(adapter, optimizer, [0, 1])
    check_states(optimizer, adapter, place="here")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("exp_avg", lambda old: old.double(), r"is torch\.float64, not torch\.float32"),
        ("exp_avg", lambda old: old[..., :1], r"is \[.*\], not \["),
        ("exp_avg", lambda old: old / 0.0, "holds NaN or infinity"),
        ("exp_avg", lambda old: 3, "is 3, no tensor"),
        ("step", lambda old: torch.tensor(True), "step is True, no number of steps"),
        ("step", lambda old: torch.tensor(0.0), "step is 0.0, no number of steps"),
        ("extra", lambda old: torch.zeros(1), "unknown .*/extra"),
    ],
)
def test_a_state_that_no_step_leaves_is_refused(part, value, message):
    adapter = make_adapter("adamw")
    optimizer = make_optimizer(adapter, OptimConfig(name="adamw"))
    step_once(adapter, optimizer, [0, 1])
    parameter = next(adapter.inventory.parameters())
    optimizer.state[parameter][part] = value(optimizer.state[parameter].get(part))
    with pytest.raises(RunError, match=f"here: .*{message}"):
        check_states(optimizer, adapter, place="here")


def test_a_step_leaves_the_routing_rows_of_absent_tasks_bit_for_bit():
    adapter = make_adapter()
    before = adapter.routing_logits.detach().clone()
    step_once(adapter, make_optimizer(adapter, OptimConfig()), ["sort", "copy"])
    moved = [not torch.equal(*rows) for rows in zip(adapter.routing_logits, before, strict=True)]
    assert moved == [True, False, True, False, False]


@pytest.mark.parametrize("options", [{}, LORA], ids=["MHR", "LoRA"])
def test_a_step_leaves_the_private_tensors_of_absent_tasks_bit_for_bit(options):
    adapter = make_adapter(private=True, **options)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    step_once(adapter, make_optimizer(adapter, OptimConfig()), ["sort", "copy"])
    for name, parameter in adapter.named_parameters():
        dim = 0 if name == "routing_logits" else 1
        pairs = zip(parameter.unbind(dim), before[name].unbind(dim), strict=True)
        assert [not torch.equal(*pair) for pair in pairs] == [True, False, True, False, False]


# --- rates


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 99: 1 / 90, 100: 0.0}),
        ("cosine", {0: 0.0, 10: 1.0, 40: 0.75, 55: 0.5, 100: 0.0}),
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
    ],
)
def test_the_rate_warms_up_and_decays(decay, factors):
    for warmup in ({"warmup_steps": 10}, {"warmup_fraction": 0.1}):
        schedule = ScheduleConfig(steps=100, decay=decay, **warmup)
        found = {step: rate_factor(schedule, step) for step in factors}
        assert found == pytest.approx(factors, abs=1e-12), warmup


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert rate_factor(ScheduleConfig(steps=100, decay="linear"), 0) == 1.0


def test_rates_are_set_from_their_peaks():
    optimizer = make_optimizer(make_adapter(), OptimConfig(lr=0.01, routing_lr=0.5))
    set_rates(optimizer, 0.0)
    assert set_rates(optimizer, 0.5) == {"inventory": 0.005, "routing": 0.25}


# --- annealing

ANNEALED = ScheduleConfig(steps=10, anneal_routing_steps=4)


def test_routing_is_its_own_before_annealing_begins():
    assert [uniform_share(ANNEALED, step) for step in range(6)] == [0.0] * 6


def test_annealing_follows_a_quarter_cosine_to_the_average():
    shares = [uniform_share(ANNEALED, step) for step in range(6, 10)]
    assert shares == pytest.approx([1 - math.cos(math.pi / 2 * k / 4) for k in (1, 2, 3, 4)])
    assert shares[-1] == pytest.approx(1.0)


def test_without_annealing_routing_is_always_its_own():
    assert {uniform_share(ScheduleConfig(steps=5), step) for step in range(5)} == {0.0}
