"""The adapted linear on every path that rows can take to their slots."""

from dataclasses import dataclass

import pytest
import reference
import torch
from tiny import Recorder, make_linear, tensors_of

from mhr_scale.adapters import AdapterConfig
from mhr_scale.errors import AdapterError

N_IN, N_OUT, N_TOKENS = 12, 8, 5


@dataclass(frozen=True)
class Rows:
    """Task ids of a batch, and a rank that decides the path where slots are ragged."""

    task_ids: tuple[int, ...]
    rank: int = 2

    def config(self, kind):
        return AdapterConfig(kind=kind, rank=self.rank, alpha=3.0, n_skills=3, n_splits=4)


ROWS = {
    "one slot": Rows((1, 1, 1, 1, 1, 1)),
    "even": Rows((0, 0, 3, 3, 1, 1)),
    "even, one row each": Rows((2, 0, 3, 1)),
    "ragged": Rows((2, 0, 2, 1, 0, 0)),
    "ragged, interleaved": Rows((0, 1, 0, 1)),
    "ragged, wide": Rows((2, 0, 2, 1, 0, 0), rank=11),
}


@pytest.fixture(params=ROWS, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def rows(request):
    return ROWS[request.param]


@pytest.fixture(params=[1, 3], ids=["one-row-per-example", "three-rows-per-example"])
def n_copies(request):
    return request.param


@pytest.fixture(params=["lora", "ia3"])
def kind(request):
    return request.param


def make_x(n_rows):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n_rows, N_TOKENS, N_IN, generator=generator, dtype=torch.float64)


def cotangent_of(y):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(y.shape, generator=generator, dtype=y.dtype)


def run_ours(rows, kind, n_copies):
    adapter = make_linear(rows.config(kind), n_in=N_IN, n_out=N_OUT)
    x = make_x(len(rows.task_ids) * n_copies).requires_grad_()
    with adapter.slots(rows.task_ids, rows_per_example=n_copies) as slots:
        y = adapter.linears[0](x)
        slots.backward((y * cotangent_of(y)).sum())
    return y.detach(), {"x": x.grad, **tensors_of(adapter, gradients=True)}


def run_reference(rows, kind, n_copies):
    adapter = make_linear(rows.config(kind), n_in=N_IN, n_out=N_OUT)
    leaves = {name: t.requires_grad_() for name, t in tensors_of(adapter).items()}
    sides = [leaves[name][0] for name in leaves if name.startswith("inventory.")]
    x = make_x(len(rows.task_ids) * n_copies).requires_grad_()
    weight, table = adapter.linears[0].weight, leaves["routing_logits"][:, 0]
    task_ids = [task for task in rows.task_ids for _ in range(n_copies)]
    if kind == "lora":
        y = reference.low_rank_linear(x, weight, *sides, table, task_ids, alpha=3.0)
    else:
        y = reference.scaled_linear(x, weight, *sides, table, task_ids)
    (y * cotangent_of(y)).sum().backward()
    return y.detach(), {"x": x.grad, **{name: leaf.grad for name, leaf in leaves.items()}}


def test_output_and_all_gradients_equal_the_reference(rows, kind, n_copies):
    ours, gradients = run_ours(rows, kind, n_copies)
    oracle, expected = run_reference(rows, kind, n_copies)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def test_rows_may_be_single_vectors(rows, kind):
    adapter = make_linear(rows.config(kind), n_in=N_IN, n_out=N_OUT)
    x_BLI = make_x(len(rows.task_ids))
    with torch.no_grad(), adapter.slots(rows.task_ids):
        whole = adapter.linears[0](x_BLI)
        first_token = adapter.linears[0](x_BLI[:, 0])
    torch.testing.assert_close(first_token, whole[:, 0], rtol=1e-12, atol=1e-12)


def test_output_of_four_dimensions_has_the_shape_of_the_frozen_product(rows, kind):
    adapter = make_linear(rows.config(kind), n_in=N_IN, n_out=N_OUT)
    x = torch.zeros(len(rows.task_ids) * 2, 2, 4, N_IN, dtype=torch.float64)
    with torch.no_grad(), adapter.slots(rows.task_ids, rows_per_example=2):
        assert adapter.linears[0](x).shape == (*x.shape[:-1], N_OUT)


@pytest.mark.parametrize(
    ("name", "n_pairs"),
    [
        ("one slot", None),
        ("even", 3),
        ("even, one row each", 4),
        ("ragged", 6),
        ("ragged, interleaved", 4),
        ("ragged, wide", 6),
    ],
)
def test_ragged_rows_get_a_slot_each_and_even_ones_share(name, n_pairs):
    rows = ROWS[name]
    adapter = make_linear(rows.config("lora"), n_in=N_IN, n_out=N_OUT)
    with adapter.slots(rows.task_ids):
        slots = adapter.linears[0].slots
    leading = () if n_pairs is None else (n_pairs,)
    assert slots.a_UIX.shape == (*leading, N_IN, rows.rank)
    assert slots.b_URO[0].shape == (*leading, rows.rank, N_OUT)


@pytest.mark.parametrize("n_rows", [7, 12, 18])
@pytest.mark.parametrize("name", ["one slot", "ragged"])
def test_a_pass_with_other_rows_than_the_examples_is_refused(kind, name, n_rows):
    rows = ROWS[name]
    adapter = make_linear(rows.config(kind), n_in=N_IN, n_out=N_OUT)
    with (
        adapter.slots(rows.task_ids, rows_per_example=4),
        pytest.raises(AdapterError, match=f"linear got {n_rows} rows .* made for 6 examples"),
    ):
        adapter.linears[0](make_x(n_rows))


def test_a_single_id_stands_for_all_rows(kind):
    adapter = make_linear(ROWS["even"].config(kind), n_in=N_IN, n_out=N_OUT)
    x, found = make_x(6), []
    for task_ids in ([1], [1] * 6):
        with torch.no_grad(), adapter.slots(task_ids):
            found.append(adapter.linears[0](x))
    assert torch.equal(*found)


@pytest.mark.parametrize("n_copies", [2, 3])
def test_pairs_are_copied_for_examples_not_for_their_rows(n_copies):
    task_ids = (2, 0, 2, 1, 0, 0, 3, 1, 1)
    adapter = make_linear(AdapterConfig(rank=3, n_skills=5), n_in=20, n_out=22)
    n_rows = len(task_ids) * n_copies
    x = torch.randn(n_rows, 2, 20, dtype=torch.float64, requires_grad=True)
    filled = adapter.slots(task_ids, rows_per_example=n_copies)
    with filled as slots, Recorder() as recorder:
        slots.backward(adapter.linears[0](x).square().sum())
    copies = {tuple(sorted((n_rows, width, 3))) for width in (20, 22)}
    assert {shape for shape in recorder.shapes if tuple(sorted(shape)) in copies} == set()


def test_forward_and_backward_never_wait_for_the_device(rows, kind):
    adapter = make_linear(rows.config(kind), n_in=N_IN, n_out=N_OUT)
    x = make_x(len(rows.task_ids)).requires_grad_()
    with adapter.slots(rows.task_ids) as slots, Recorder() as recorder:
        slots.backward(adapter.linears[0](x).sum())
    assert recorder.count(Recorder.SYNCS) == 0


def test_the_recorder_notices_a_wait():
    with Recorder() as recorder:
        torch.ones(1).item()
    assert recorder.count(Recorder.SYNCS) == 1


def test_frozen_weight_gets_no_gradient(kind):
    rows = ROWS["ragged"]
    adapter = make_linear(rows.config(kind), n_in=N_IN, n_out=N_OUT)
    with adapter.slots(rows.task_ids) as slots:
        slots.backward(adapter.linears[0](make_x(len(rows.task_ids))).sum())
    assert adapter.linears[0].weight.grad is None
