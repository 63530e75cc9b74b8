"""Initial values and shapes of the inventory."""

import pytest
import torch
from tiny import TASKS, make_t5

from mhr_scale.adapters import AdapterConfig, attach


def make(*, seed=0, **options):
    return attach(make_t5(), AdapterConfig(**options), tasks=TASKS, seed=seed)


def initial(adapter, name):
    return dict(adapter.inventory.named_tensors())[name]


@pytest.mark.parametrize("n_splits", [1, 4])
def test_a_starts_uniform_within_a_bound_of_the_whole_input_width(n_splits):
    adapter = make(n_skills=50, n_splits=n_splits, rank=4)
    for stack in adapter.inventory.stacks:
        bound = (3 * stack.in_features) ** -0.5
        largest = adapter.inventory.stacked(stack, "A").abs().max().item()
        assert 0.999 * bound < largest <= bound


def test_a_has_the_spread_of_a_uniform_distribution():
    a = initial(make(n_skills=50, rank=4), "encoder.block.0.layer.0.SelfAttention.q.A")
    assert a.std().item() == pytest.approx((3 * 32) ** -0.5 / 3**0.5, rel=0.05)


def test_b_starts_at_zero():
    adapter = make(n_skills=3)
    for stack in adapter.inventory.stacks:
        assert not adapter.inventory.stacked(stack, "B").any()


def test_ia3_vectors_start_at_one():
    adapter = make(kind="ia3", layout="light", n_skills=3)
    assert all(bool((parameter == 1.0).all()) for parameter in adapter.inventory.parameters())


def test_the_initial_values_of_a_linear_do_not_depend_on_the_layout():
    name = "decoder.block.1.layer.1.EncDecAttention.v.A"
    found = [initial(make(layout=layout), name) for layout in ("full", "light", "attention")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_linears_and_skills_start_apart():
    adapter = make(n_skills=3, rank=2)
    query, key = (
        initial(adapter, f"encoder.block.0.layer.0.SelfAttention.{name}.A") for name in "qk"
    )
    assert not torch.isclose(query, key).all()
    assert not torch.isclose(query[:, 0], query[:, 1]).all()


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"n_skills": 3, "n_splits": 4, "rank": 2}, {"A": (4, 3, 12, 2), "B": (4, 3, 2, 8)}),
        ({"n_skills": 1, "private": True}, {"A": (4, 1, 1, 48, 1), "B": (4, 1, 1, 1, 32)}),
        ({"kind": "ia3", "n_skills": 3, "n_splits": 4}, {"l": (4, 3, 8)}),
    ],
    ids=["MHR", "private", "ia3"],
)
def test_a_splits_along_the_input_and_b_along_the_output(options, shapes):
    adapter = make(**options)
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    found = {side: tuple(initial(adapter, f"{name}.{side}").shape) for side in shapes}
    assert found == shapes


def test_linears_of_one_shape_share_a_tensor():
    adapter = make(n_skills=3)
    found = {name: tensor.shape[0] for name, tensor in adapter.inventory.named_parameters()}
    widths = {"32x32": 24, "32x48": 8, "48x32": 4}
    assert found == {f"{side}_{key}": count for key, count in widths.items() for side in "AB"}
