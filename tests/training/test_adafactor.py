"""Adafactor on stacked tensors against transformers' on separate ones; norms and clipping."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as Oracle

from mhr_scale.training import optim
from mhr_scale.training.optim import Adafactor, clip_gradients, gradient_norm

STEPS = 20
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
    scale_parameter = options.pop("scale_parameter", False)
    group = {"params": [parameter], "lr": 1e-2, "weight_decay": 0.0, **options}
    optimizer = Adafactor([group], scale_parameter=scale_parameter)
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


def test_a_stack_moves_as_its_separate_tensors_do(stack, scale_parameter):
    shape, lead = stack
    start, stream = numbers(*shape, seed=0), list(gradient_stream(shape))
    options = {"scale_parameter": scale_parameter, "weight_decay": 0.1}
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
def test_separate_tensors_may_have_rates_of_their_own(weight_decay):
    shape, lead = STACKS["private B"]
    start, stream = numbers(*shape, seed=0), list(gradient_stream(shape))
    options = {"scale_parameter": True, "weight_decay": weight_decay}
    rates_T = torch.tensor([1e-2, 0.0, 3e-3, 1.0], dtype=torch.float64)
    found = run_ours(start, stream, lead=lead, lr=rates_T[:, None, None, None, None], **options)
    for task, rate in enumerate(rates_T.tolist()):
        gradients = [list(gradient[:, task]) for gradient in stream]
        expected = run_oracle(list(start[:, task]), gradients, lr=rate, **options)
        assert_parts_close(list(found[:, task]), expected)


def test_a_parameter_without_a_gradient_is_left_alone():
    parameter = nn.Parameter(numbers(4, 5, seed=0))
    before = parameter.data.clone()
    group = {"params": [parameter], "lr": 1e-2, "weight_decay": 0.1}
    Adafactor([group], scale_parameter=False).step()
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
def test_routing_moves_as_one_table_per_group(make_stream, scale_parameter, monkeypatch):
    monkeypatch.setattr(optim, "LEAST_SQUARE", 0.1)  # large enough to tell
    start, stream = numbers(*TABLE, seed=0), list(make_stream())
    options = {"scale_parameter": scale_parameter}
    found = run_ours(start, stream, routing=True, **options)
    options["eps"] = (0.1, 1e-3)
    expected = run_oracle(tables(start), [tables(gradient) for gradient in stream], **options)
    assert_parts_close(tables(found), expected)


def test_routing_rows_apart_move_as_tables_of_one_row(scale_parameter, monkeypatch):
    monkeypatch.setattr(optim, "LEAST_SQUARE", 0.1)  # large enough to tell
    start, stream = numbers(*TABLE, seed=0), list(gradient_stream(TABLE))
    options = {"scale_parameter": scale_parameter}
    found = run_ours(start, stream, routing=True, rows_apart=True, **options)

    def rows(tensor):
        return list(tensor.flatten(0, 1).flatten(1)[:, None])

    options["eps"] = (0.1, 1e-3)
    expected = run_oracle(rows(start), [rows(gradient) for gradient in stream], **options)
    assert_parts_close(rows(found), expected)


@pytest.mark.parametrize("eps", [1e-30, 0.1])
@pytest.mark.parametrize("make_sparse", [sparse_rows, halved_rows])
def test_sparse_rows_move_as_dense_ones_with_zeros(make_sparse, eps, scale_parameter, monkeypatch):
    monkeypatch.setattr(optim, "LEAST_SQUARE", eps)
    start, stream = numbers(*TABLE, seed=0), list(row_stream())
    options = {"routing": True, "scale_parameter": scale_parameter}
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
