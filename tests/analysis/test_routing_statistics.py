"""Figures of a routing against loops over its definition, and at their bounds."""

import math

import numpy as np
import pytest
import torch
from small_subjects import CONFIGS, make_setup

from mhr_scale.analysis.routing_statistics import describe_routing, row_figures, task_similarity

OFF, ON = -1e4, 1e4


def figures(logits: list[float]) -> dict[str, float]:
    p = torch.sigmoid(torch.tensor([[[logits]]], dtype=torch.float64))
    found = row_figures(p / p.sum(-1, keepdim=True), p)
    return {name: value.item() for name, value in found.items()}


def test_one_skill_alone_is_as_sparse_and_discrete_as_can_be() -> None:
    expected = {"sparsity": 1.0, "discreteness": 1.0, "entropy": 0.0, "effective_skills": 1.0}
    assert figures([ON, OFF, OFF, OFF]) == pytest.approx(expected, abs=1e-9)


def test_routing_as_it_starts_is_neither_sparse_nor_discrete() -> None:
    expected = {"sparsity": 0.0, "discreteness": 0.0, "entropy": 1.0, "effective_skills": 4.0}
    assert figures([0.0] * 4) == pytest.approx(expected, abs=1e-9)


def test_two_skills_of_four_switched_on_are_discrete_and_half_in_effect() -> None:
    root = math.sqrt(2.0)
    expected = {
        "sparsity": 2.0 - root,
        "discreteness": 1.0,
        "entropy": 0.5,
        "effective_skills": 2.0,
    }
    assert figures([ON, OFF, ON, OFF]) == pytest.approx(expected, abs=1e-9)


def test_all_skills_switched_on_are_discrete_but_not_sparse() -> None:
    found = figures([ON] * 4)
    assert (found["sparsity"], found["discreteness"]) == pytest.approx((0.0, 1.0), abs=1e-9)


@pytest.mark.parametrize("method", ["Poly", "MHR", "MHR-(IA)3"])
def test_figures_are_the_means_of_their_definitions(method: str) -> None:
    adapter = make_setup(CONFIGS[method]).adapter
    found = describe_routing(adapter)
    assert found is not None
    assert adapter.routing_logits is not None
    z_TGQS = adapter.routing_logits.detach().numpy()
    n_tasks, _, n_splits, n_skills = z_TGQS.shape
    assert [group["name"] for group in found["groups"]] == list(adapter.groups)
    for g, group in enumerate(found["groups"]):
        rows, usage = [], np.zeros(n_skills)
        for t in range(n_tasks):
            for q in range(n_splits):
                p = [1 / (1 + math.exp(-z)) for z in z_TGQS[t, g, q]]
                w = [one / sum(p) for one in p]
                usage += np.array(w) / n_tasks / n_splits
                entropy = -sum(one * math.log(one) for one in w)
                root = math.sqrt(n_skills)
                bits = [-a * math.log2(a) - (1 - a) * math.log2(1 - a) for a in p]
                hoyer = (root - 1 / math.sqrt(sum(one**2 for one in w))) / (root - 1)
                rows.append((hoyer, 1 - np.mean(bits), entropy / math.log(n_skills)))
        names = ("sparsity", "discreteness", "entropy")
        assert [group[n] for n in names] == pytest.approx(np.mean(rows, 0).tolist(), abs=1e-9)
        assert group["usage"] == pytest.approx(usage.tolist(), abs=1e-9)
    for name in ("sparsity", "discreteness", "entropy"):
        assert found[name] == pytest.approx(np.mean([group[name] for group in found["groups"]]))
    assert sum(found["usage"]) == pytest.approx(1.0)
    assert 1.0 <= found["effective_skills"] <= n_skills


def test_lora_and_uniform_weights_have_no_routing_to_describe() -> None:
    assert describe_routing(make_setup(CONFIGS["LoRA"]).adapter) is None


def test_task_similarity_is_the_cosine_of_deviations_from_the_mean_task() -> None:
    w_TGQS = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).view(3, 1, 1, 2).double()
    expected = [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    assert task_similarity(w_TGQS) == pytest.approx(np.array(expected))
    w = torch.rand(5, 3, 2, 4, dtype=torch.float64)
    flat = w.reshape(5, -1).numpy()
    centred = flat - flat.mean(0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    assert task_similarity(w) == pytest.approx(units @ units.T)


@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_tasks_that_are_all_the_same_are_wholly_similar(n_tasks: int) -> None:
    w_TGQS = torch.rand(1, 2, 2, 3).double().expand(n_tasks, -1, -1, -1)
    assert np.array_equal(task_similarity(w_TGQS), np.ones((n_tasks, n_tasks)))


def test_a_task_that_is_the_mean_is_like_no_other() -> None:
    w_TGQS = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]).view(3, 1, 1, 2).double()
    assert task_similarity(w_TGQS)[2] == pytest.approx([0.0, 0.0, 1.0])
