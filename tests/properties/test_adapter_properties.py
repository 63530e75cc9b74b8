"""What holds for every inventory, whatever its sizes and numbers: float64, small shapes.

Shape letters: B rows, L tokens, I in features, O out features, R rank, S skills, Q splits, T tasks.
"""

from dataclasses import dataclass, replace

import reference
import torch
from adapters.tiny import TASKS, make_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from mhr_scale.adapters import Adapter, AdapterConfig, routing
from mhr_scale.adapters.collapse import average
from mhr_scale.adapters.linear import AdaptedLinear

few = settings(max_examples=50, deadline=None)


@dataclass(frozen=True)
class Example:
    """An adapted linear, inputs, and a task per row."""

    adapter: Adapter
    x_BLI: torch.Tensor
    task_ids: tuple[int, ...]

    @property
    def config(self):
        return self.adapter.config

    def side(self, name):
        """A (Q, S, I, R) or B (Q, S, R, O)."""
        return self.adapter.inventory.stacked(self.adapter.inventory.stacks[0], name).data[0]

    @property
    def logits_TQS(self):
        return self.adapter.routing_logits.data[:, 0]

    @property
    def base(self):
        return self.adapter.linears[0].base

    def output(self, adapter=None, *, x=None, task_ids=None):
        """Output of the linear under an adapter, by default the example's own."""
        adapter = adapter or self.adapter
        with torch.no_grad(), adapter.slots(task_ids or self.task_ids):
            return adapter.linears[0](self.x_BLI if x is None else x)

    def rebuilt(self, config, a_QSIR, b_QSRO, logits_TQS=None):
        """The same linear under another setting with these tensors."""
        made = make_linear(config, n_in=self.base.in_features, n_out=self.base.out_features)
        made.linears = [AdaptedLinear(self.base, "linear")]
        for name, tensor in (("A", a_QSIR), ("B", b_QSRO)):
            stacked = made.inventory.stacked(made.inventory.stacks[0], name)
            assert stacked.shape[1:] == tensor.shape
            stacked.data[0] = tensor
        if logits_TQS is not None:
            made.routing_logits.data[:, 0] = logits_TQS
        return made


@st.composite
def examples(draw, *, min_splits=1, skills=(2, 3, 4, 5)):
    """Up to 4 splits, 5 skills, 3 ranks, 6 rows of 4 tasks."""
    n_splits = draw(st.integers(min_splits, 4))
    config = AdapterConfig(
        n_splits=n_splits,
        n_skills=draw(st.sampled_from(skills)),
        rank=draw(st.integers(1, 3)),
        alpha=draw(st.sampled_from([0.5, 1.0, 16.0])),
    )
    adapter = make_linear(
        config,
        n_in=n_splits * draw(st.integers(1, 4)),
        n_out=n_splits * draw(st.integers(1, 4)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=generator)
    task_ids = tuple(draw(st.lists(st.integers(0, len(TASKS) - 1), min_size=1, max_size=6)))
    x_BLI = torch.empty(
        len(task_ids), draw(st.integers(1, 3)), adapter.sites[0].in_features, dtype=torch.float64
    ).normal_(generator=generator)
    return Example(adapter=adapter, x_BLI=x_BLI, task_ids=task_ids)


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@given(examples())
@few
def test_the_factored_product_is_that_of_each_example_s_own_matrices(example):
    expected = reference.low_rank_linear(
        example.x_BLI,
        example.base.weight,
        example.side("A"),
        example.side("B"),
        example.logits_TQS,
        example.task_ids,
        alpha=example.config.alpha,
    )
    assert_close(example.output(), expected, 1e-12)


@given(examples(), st.randoms(use_true_random=False))
@few
def test_skills_have_no_order(example, random):
    order = random.sample(range(example.config.n_skills), example.config.n_skills)
    permuted = example.rebuilt(
        example.config,
        example.side("A")[:, order],
        example.side("B")[:, order],
        example.logits_TQS[:, :, order],
    )
    assert_close(example.output(permuted), example.output(), 1e-12)


@given(examples(), st.randoms(use_true_random=False))
@few
def test_permuting_rows_permutes_outputs(example, random):
    n_rows = len(example.task_ids)
    order = random.sample(range(n_rows), n_rows)
    found = example.output(
        x=example.x_BLI[order], task_ids=tuple(example.task_ids[row] for row in order)
    )
    assert_close(found, example.output()[order], 1e-13)


@given(examples(), st.randoms(use_true_random=False))
@few
def test_tasks_have_no_order(example, random):
    order = random.sample(range(len(TASKS)), len(TASKS))
    permuted = example.rebuilt(
        example.config, example.side("A"), example.side("B"), example.logits_TQS[order]
    )
    task_ids = tuple(order.index(task) for task in example.task_ids)
    assert_close(example.output(permuted, task_ids=task_ids), example.output(), 1e-13)


@given(examples(skills=(2, 4)))  # the average's 1 / S is float32
@few
def test_zero_logits_give_the_averaged_adapter(example):
    example.logits_TQS.zero_()
    mean = average(example.adapter)
    mean.linears = [AdaptedLinear(example.base, "linear")]
    found = example.output(mean, task_ids=(0,) * len(example.task_ids))
    assert_close(found, example.output(), 1e-10)


@given(examples(min_splits=2))
@few
def test_equal_routing_in_all_splits_is_poly_with_unsplit_tensors(example):
    logits_T1S = example.logits_TQS[:, :1].clone()
    example.logits_TQS.copy_(logits_T1S.expand_as(example.logits_TQS))
    poly = example.rebuilt(
        replace(example.config, n_splits=1),
        torch.cat(list(example.side("A")), 1)[None],
        torch.cat(list(example.side("B")), 2)[None],
        logits_T1S,
    )
    assert_close(example.output(poly), example.output(), 1e-13)


@given(examples())
@few
def test_one_skill_is_a_plain_lora(example):
    config = replace(example.config, n_skills=1, n_splits=1)
    n_in, n_out = example.base.in_features, example.base.out_features
    lora = make_linear(config, n_in=n_in, n_out=n_out)
    a_IR, b_RO = (parameter.data[0, 0, 0] for parameter in lora.inventory.parameters())
    frozen = lora.linears[0].base(example.x_BLI).detach()
    expected = frozen + config.alpha / config.rank * (example.x_BLI @ a_IR @ b_RO)
    assert_close(example.output(lora), expected, 1e-12)


@given(st.floats(-5.0, 5.0), st.integers(1, 4))
@few
def test_the_weight_of_a_lone_skill_is_one(logit, n_splits):
    logits_UGQS = torch.full((1, 1, n_splits, 1), logit, dtype=torch.float64)
    weights = routing.mixing_weights(logits_UGQS, AdapterConfig().routing, seeds=None)
    assert_close(weights, torch.ones_like(weights), 2e-10)


@given(examples())
@few
def test_mixing_weights_sum_to_one(example):
    weights = routing.mixing_weights(
        example.logits_TQS[:, None], example.config.routing, seeds=None
    )
    total = weights.sum(-1)
    assert_close(total, torch.ones_like(total), 1e-9)


@given(examples())
@few
def test_the_mixed_update_has_at_most_the_rank_of_a_skill(example):
    n_in = example.base.in_features
    unit = torch.eye(n_in, dtype=torch.float64)[None]
    task = example.task_ids[0]
    update_IO = example.output(x=unit, task_ids=(task,))[0] - example.base(unit[0]).detach()
    values = torch.linalg.svdvals(update_IO)[example.config.rank :]
    assert (values < 1e-10 * max(1.0, update_IO.norm().item())).all()


@given(examples(), st.sampled_from([-2.0, -0.5, 0.5, 2.0]))
@few
def test_adding_a_constant_to_the_logits_changes_the_weights(example, constant):
    n_skills = example.config.n_skills
    logits = torch.linspace(-1.0, 1.0, n_skills, dtype=torch.float64)[None, None, None]
    before = routing.mixing_weights(logits, example.config.routing, seeds=None)
    after = routing.mixing_weights(logits + constant, example.config.routing, seeds=None)
    assert (after - before).abs().max() > 1e-3


@given(examples())
@few
def test_a_zero_b_leaves_the_frozen_product_bit_for_bit(example):
    example.side("B").zero_()
    with example.adapter.off():
        bare = example.output()
    assert torch.equal(example.output(), bare)
