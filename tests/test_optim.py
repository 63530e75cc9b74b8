"""Adafactor on stacked tensors against transformers' on separate ones; rates, norms, clipping."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as Oracle

from mhr_scale.adapters import Adapter, AdapterConfig
from mhr_scale.adapters.layout import Site
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.config import OptimConfig, ScheduleConfig
from mhr_scale.errors import RunError
from mhr_scale.optim import (
    Adafactor,
    check_states,
    clip_gradients,
    gradient_norm,
    make_optimizer,
    rate_factor,
    set_rates,
    uniform_share,
)

STEPS = 20
TASKS = ("copy", "reverse", "sort", "count", "swap")
#: What inventories look like, and how many leading dimensions index separate tensors.
STACKS = {
    "A of two linears": ((2, 3, 4, 5, 2), 1),
    "B of two linears": ((2, 3, 4, 2, 5), 1),
    "rank 1, one skill": ((3, 1, 1, 6, 1), 1),
    "private A": ((2, 4, 3, 2, 5, 2), 2),
    "private B": ((2, 4, 3, 2, 2, 5), 2),
    "(IA)3": ((3, 2, 4, 5), 1),
    "private (IA)3": ((3, 4, 1, 1, 6), 2),
    "one tensor": ((4, 5), 0),
    "one vector": ((7,), 0),
}
#: A routing table: tasks, groups, splits, skills.
TABLE = (5, 3, 2, 4)


@pytest.fixture(params=[False, True], ids=["plain", "scale_parameter"])
def scale_parameter(request):
    return request.param


@pytest.fixture(params=STACKS, ids=lambda name: name.replace(",", "").replace(" ", "-"))
def stack(request):
    return STACKS[request.param]


def numbers(*shape, seed) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient_stream(shape) -> Iterator[torch.Tensor]:
    """Gradients whose size differs between entries and changes over the steps."""
    size = numbers(*shape, seed=1).exp()
    for step in range(STEPS):
        yield numbers(*shape, seed=10 + step) * size * (1.0 + step) ** 0.5


def run_ours(start, gradients, **options):
    parameter = nn.Parameter(start.clone())
    group = {"params": [parameter]}
    for name in ("lead", "routing", "rows_apart"):
        if name in options:
            group[name] = options.pop(name)
    optimizer = Adafactor([group], **{"lr": 1e-2, **options})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.data


def run_oracle(parts, gradients_of_parts, **options):
    """transformers' Adafactor on separate tensors; gradients come as one list per step."""
    parameters = [nn.Parameter(part.clone()) for part in parts]
    options = {"lr": 1e-2, "relative_step": False, "warmup_init": False, **options}
    optimizer = Oracle(parameters, **options)
    for gradients in gradients_of_parts:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.data for parameter in parameters]


def separate(tensor, lead):
    """The separate tensors of a stack."""
    return list(tensor.flatten(0, lead - 1)) if lead else [tensor]


def tables(tensor):
    """The separate tables (T, Q * S) of a routing tensor (T, G, Q, S)."""
    return [tensor[:, group].flatten(1) for group in range(tensor.shape[1])]


def assert_parts_close(found, expected):
    for part, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(part, oracle, rtol=1e-10, atol=1e-12)


# --- Adafactor, dense


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_stack_moves_as_its_separate_tensors_do(stack, scale_parameter, weight_decay):
    shape, lead = stack
    start, stream = numbers(*shape, seed=0), list(gradient_stream(shape))
    options = {"scale_parameter": scale_parameter, "weight_decay": weight_decay}
    found = run_ours(start, stream, lead=lead, **options)
    expected = run_oracle(
        separate(start, lead), [separate(gradient, lead) for gradient in stream], **options
    )
    assert_parts_close(separate(found, lead), expected)


def test_stacking_without_lead_would_change_the_update():
    shape, lead = STACKS["A of two linears"]
    start, stream = numbers(*shape, seed=0), list(gradient_stream(shape))
    found = run_ours(start, stream, lead=lead, scale_parameter=True)
    assert (found - run_ours(start, stream, lead=0, scale_parameter=True)).abs().max() > 1e-4


def test_ia3_vectors_of_plain_adapters_move_as_vectors(scale_parameter):
    shape = (3, 1, 1, 6)
    start, stream = numbers(*shape, seed=0), list(gradient_stream(shape))
    found = run_ours(start, stream, lead=1, scale_parameter=scale_parameter)
    expected = run_oracle(
        list(start[:, 0, 0]),
        [list(gradient[:, 0, 0]) for gradient in stream],
        scale_parameter=scale_parameter,
    )
    assert_parts_close(list(found[:, 0, 0]), expected)


def test_private_inventories_without_a_gradient_stay_bit_for_bit():
    shape, lead = STACKS["private A"]
    start = numbers(*shape, seed=0)
    stream = list(gradient_stream(shape))
    for gradient in stream:
        gradient[:, 2] = 0.0
    found = run_ours(start, stream, lead=lead)
    assert torch.equal(found[:, 2], start[:, 2])
    assert not torch.equal(found[:, 1], start[:, 1])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_separate_tensors_may_have_rates_of_their_own(scale_parameter, weight_decay):
    shape, lead = STACKS["private B"]
    start, stream = numbers(*shape, seed=0), list(gradient_stream(shape))
    options = {"scale_parameter": scale_parameter, "weight_decay": weight_decay}
    rates_T = torch.tensor([1e-2, 0.0, 3e-3, 1.0], dtype=torch.float64)
    found = run_ours(start, stream, lead=lead, lr=rates_T[:, None, None, None, None], **options)
    for task, rate in enumerate(rates_T.tolist()):
        gradients = [list(gradient[:, task]) for gradient in stream]
        expected = run_oracle(list(start[:, task]), gradients, lr=rate, **options)
        assert_parts_close(list(found[:, task]), expected)


def test_a_parameter_without_a_gradient_is_left_alone():
    parameter = nn.Parameter(numbers(4, 5, seed=0))
    before = parameter.data.clone()
    Adafactor([{"params": [parameter]}], weight_decay=0.1).step()
    assert torch.equal(parameter.data, before)


# --- Adafactor, routing tables


def row_stream() -> Iterator[torch.Tensor]:
    """Gradients of a routing tensor in which some tasks are absent from each step, one always."""
    for step, gradient in enumerate(gradient_stream(TABLE)):
        gradient[[3, step % 3]] = 0.0
        yield gradient


def sparse_rows(gradient: torch.Tensor) -> torch.Tensor:
    rows = gradient.flatten(1).any(1).nonzero()[:, 0]
    return torch.sparse_coo_tensor(
        rows[None], gradient[rows], gradient.shape, check_invariants=True
    )


def halved_rows(gradient: torch.Tensor) -> torch.Tensor:
    """The same sparse gradient with every row listed twice."""
    rows = sparse_rows(gradient).coalesce()
    index, values = rows.indices().repeat(1, 2), rows.values().repeat(2, 1, 1, 1) / 2
    return torch.sparse_coo_tensor(index, values, gradient.shape, check_invariants=True)


@pytest.mark.parametrize(
    "make_stream", [lambda: gradient_stream(TABLE), row_stream], ids=["all-rows", "some-rows"]
)
def test_routing_moves_as_one_table_per_group(make_stream, scale_parameter):
    start, stream = numbers(*TABLE, seed=0), list(make_stream())
    options = {"scale_parameter": scale_parameter, "eps": (0.1, 1e-3)}
    found = run_ours(start, stream, routing=True, **options)
    expected = run_oracle(tables(start), [tables(gradient) for gradient in stream], **options)
    assert_parts_close(tables(found), expected)


def test_routing_rows_apart_move_as_tables_of_one_row(scale_parameter):
    start, stream = numbers(*TABLE, seed=0), list(gradient_stream(TABLE))
    options = {"scale_parameter": scale_parameter, "eps": (0.1, 1e-3)}
    found = run_ours(start, stream, routing=True, rows_apart=True, **options)

    def rows(tensor):
        return list(tensor.flatten(0, 1).flatten(1)[:, None])

    expected = run_oracle(rows(start), [rows(gradient) for gradient in stream], **options)
    assert_parts_close(rows(found), expected)


@pytest.mark.parametrize("eps", [1e-30, 0.1])
@pytest.mark.parametrize("make_sparse", [sparse_rows, halved_rows])
def test_sparse_rows_move_as_dense_ones_with_zeros(make_sparse, eps, scale_parameter):
    start, stream = numbers(*TABLE, seed=0), list(row_stream())
    options = {"routing": True, "scale_parameter": scale_parameter, "eps": (eps, 1e-3)}
    dense = run_ours(start, stream, **options)
    sparse = run_ours(start, [make_sparse(gradient) for gradient in stream], **options)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)


def test_steps_with_sparse_and_dense_rows_may_alternate():
    start, stream = numbers(*TABLE, seed=0), list(row_stream())
    dense = run_ours(start, stream, routing=True)
    mixed = [g if step % 2 else sparse_rows(g) for step, g in enumerate(stream)]
    found = run_ours(start, mixed, routing=True)
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make_gradient", [sparse_rows, torch.clone], ids=["sparse", "dense"])
def test_a_table_row_without_a_gradient_stays_bit_for_bit(make_gradient):
    start = numbers(*TABLE, seed=0)
    found = run_ours(start, [make_gradient(g) for g in row_stream()], routing=True)
    assert torch.equal(found[3], start[3])
    assert not torch.equal(found[4], start[4])


# --- the optimizer of an adapter


def make_adapter(**options) -> Adapter:
    site = Site(name="x", in_features=4, out_features=6, stack="encoder", block=0, sublayer=0)
    config = AdapterConfig(**{"n_skills": 3, "n_splits": 2, "rank": 2, **options})
    adapter = Adapter(config, (site,), task_names=TASKS)
    base = nn.Linear(4, 6).requires_grad_(False)
    adapter.linears.append(AdaptedLinear(base, "x"))
    return adapter


def step_once(adapter, optimizer, task_ids):
    x = numbers(len(task_ids), 3, 4, seed=4).float()
    for _ in range(2):  # B is zero before the first update, and with it the gradient of A
        optimizer.zero_grad()
        with adapter.slots(task_ids) as slots:
            slots.backward(adapter.linears[0](x).square().sum())
        optimizer.step()


def groups_by_name(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_inventory_and_routing_have_rates_of_their_own(name):
    adapter = make_adapter()
    optimizer = make_optimizer(adapter, OptimConfig(name=name, lr=0.01, routing_lr=0.5))
    groups = groups_by_name(optimizer)
    assert {name: group["lr"] for name, group in groups.items()} == {
        "inventory": 0.01,
        "routing": 0.5,
    }
    assert groups["routing"]["params"] == [adapter.routing_logits]


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_only_the_inventory_decays(name):
    optimizer = make_optimizer(make_adapter(), OptimConfig(name=name, weight_decay=0.2))
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


@pytest.mark.parametrize(
    ("config", "is_sparse"),
    [(OptimConfig(), True), (OptimConfig(name="adamw"), False)],
    ids=["adafactor", "adamw"],
)
def test_only_adafactor_gets_sparse_routing_gradients(config, is_sparse):
    adapter = make_adapter()
    step_once(adapter, make_optimizer(adapter, config), ["sort", "copy"])
    assert adapter.routing_logits.grad.is_sparse == is_sparse


def test_adamw_after_adafactor_gets_dense_routing_gradients_again():
    adapter = make_adapter()
    make_optimizer(adapter, OptimConfig())
    step_once(adapter, make_optimizer(adapter, OptimConfig(name="adamw")), ["sort", "copy"])
    assert not adapter.routing_logits.grad.is_sparse


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_step_moves_every_trainable_tensor(name):
    adapter = make_adapter()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    step_once(adapter, make_optimizer(adapter, OptimConfig(name=name)), ["sort", "copy"])
    moved = {name: not torch.equal(p, before[name]) for name, p in adapter.named_parameters()}
    assert moved == dict.fromkeys(before, True)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_the_state_that_a_step_leaves_is_a_good_one(name):
    adapter = make_adapter()
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
    adapter = make_adapter()
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
    ("decay", "step", "factor"),
    [
        ("linear", 0, 0.0),
        ("linear", 5, 0.5),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 99, 1 / 90),
        ("linear", 100, 0.0),
        ("cosine", 0, 0.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("cosine", 40, 0.75),
        ("cosine", 100, 0.0),
        ("constant", 0, 0.0),
        ("constant", 5, 0.5),
        ("constant", 10, 1.0),
        ("constant", 99, 1.0),
    ],
)
@pytest.mark.parametrize("warmup", [{"warmup_steps": 10}, {"warmup_fraction": 0.1}], ids=str)
def test_the_rate_warms_up_and_decays(decay, step, factor, warmup):
    schedule = ScheduleConfig(steps=100, decay=decay, **warmup)
    assert rate_factor(schedule, step) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_without_warm_up_the_first_step_has_the_whole_rate(decay):
    assert rate_factor(ScheduleConfig(steps=100, decay=decay), 0) == 1.0


def test_rates_are_set_from_their_peaks():
    optimizer = make_optimizer(make_adapter(), OptimConfig(lr=0.01, routing_lr=0.5))
    set_rates(optimizer, 0.0)
    assert set_rates(optimizer, 0.5) == {"inventory": 0.005, "routing": 0.25}


# --- norm and clipping


def make_parameters(*, sparse: bool) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(shape).double()) for shape in ((3, 4), (6,), TABLE)]
    for number, parameter in enumerate(parameters):
        parameter.grad = numbers(*parameter.shape, seed=number)
    rows = next(row_stream())
    parameters[-1].grad = halved_rows(rows) if sparse else rows
    parameters.append(nn.Parameter(torch.zeros(2)))  # has no gradient
    return parameters


def dense_gradients(parameters) -> list[torch.Tensor]:
    return [p.grad.to_dense() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("sparse", [False, True])
def test_the_gradient_norm_is_that_of_all_gradients_in_one_vector(sparse):
    parameters = make_parameters(sparse=sparse)
    whole = torch.cat([gradient.flatten() for gradient in dense_gradients(parameters)])
    assert gradient_norm(parameters).item() == pytest.approx(whole.norm().item(), rel=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("clip_norm", [0.1, 1e6], ids=["clipped", "not-clipped"])
def test_clipping_equals_torch_s(sparse, clip_norm):
    expected = make_parameters(sparse=False)
    torch.nn.utils.clip_grad_norm_(expected, clip_norm)
    found = make_parameters(sparse=sparse)
    clip_gradients(found, gradient_norm(found), clip_norm)
    assert_parts_close(dense_gradients(found), dense_gradients(expected))


ANNEALED = ScheduleConfig(steps=10, anneal_routing_steps=4)


@pytest.mark.parametrize("step", range(6))
def test_routing_is_its_own_before_annealing_begins(step):
    assert uniform_share(ANNEALED, step) == 0.0


def test_annealing_follows_a_quarter_cosine_to_the_average():
    shares = [uniform_share(ANNEALED, step) for step in range(6, 10)]
    assert shares == pytest.approx([1 - math.cos(math.pi / 2 * k / 4) for k in (1, 2, 3, 4)])
    assert shares[-1] == pytest.approx(1.0)


def test_without_annealing_routing_is_always_its_own():
    assert {uniform_share(ScheduleConfig(steps=5), step) for step in range(5)} == {0.0}
