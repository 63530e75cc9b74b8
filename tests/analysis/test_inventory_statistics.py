"""Norms and overlaps of updates against dense matrices."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_subjects import CONFIGS, make_setup

from mhr_scale.adapters import Adapter
from mhr_scale.analysis.inventory_statistics import describe_inventory, update_grams


def dense_update(adapter: Adapter, name: str, skill: int) -> np.ndarray:
    """What a task adds to a linear that uses one skill in every split."""
    tensors = {key: value.double() for key, value in adapter.inventory.named_tensors()}
    if adapter.config.kind == "ia3":
        return (torch.cat(list(tensors[f"{name}.l"][:, skill])) - 1.0).numpy()
    a = torch.cat(list(tensors[f"{name}.A"][:, skill]), 0)
    b = torch.cat(list(tensors[f"{name}.B"][:, skill]), 1)
    return (adapter.config.scale * a @ b).numpy()


@pytest.mark.parametrize("method", CONFIGS)
def test_norms_and_overlaps_are_those_of_dense_updates(method: str) -> None:
    adapter = make_setup(replace(CONFIGS[method], alpha=3.0)).adapter
    found = describe_inventory(adapter)
    skills = range(adapter.config.n_skills)
    cosines = []
    for site, linear in zip(adapter.sites, found["linears"], strict=True):
        updates = [dense_update(adapter, site.name, skill).ravel() for skill in skills]
        norms = [np.linalg.norm(update) for update in updates]
        assert (linear["name"], linear["norms"]) == (site.name, pytest.approx(norms))
        units = np.stack([u / n for u, n in zip(updates, norms, strict=True)])
        cosines.append(np.abs(units @ units.T))
        pairs = cosines[-1][np.triu_indices(len(units), 1)]
        assert linear["overlap"] == (pytest.approx(pairs.mean()) if len(pairs) else None)
    assert np.array(found["overlap"]) == pytest.approx(np.mean(cosines, 0))
    assert found["norms"] == pytest.approx(np.mean([one["norms"] for one in found["linears"]], 0))


def test_parallel_skills_overlap_wholly_and_skills_of_other_splits_not_at_all() -> None:
    adapter = make_setup(CONFIGS["MHR"]).adapter
    with torch.no_grad():
        for stack in adapter.inventory.stacks:
            for side in "AB":
                tensor_NQSXY = adapter.inventory.stacked(stack, side)
                tensor_NQSXY[:, 1:, 0] = 0.0  # skill 0 lives in the first split alone,
                tensor_NQSXY[:, 0, 2] = 0.0  # skill 2 in the others,
                tensor_NQSXY[:, :, 1] = 2.0 * tensor_NQSXY[:, :, 0]  # skill 1 is skill 0
    found = describe_inventory(adapter)["overlap"]
    assert found[0][1] == pytest.approx(1.0)
    assert found[0][2] == pytest.approx(0.0, abs=1e-12)


def test_a_fresh_adapter_has_zero_norms_and_no_overlap() -> None:
    adapter = make_setup(CONFIGS["MHR"]).adapter
    with torch.no_grad():
        for stack in adapter.inventory.stacks:
            adapter.inventory.stacked(stack, "B").zero_()
    found = describe_inventory(adapter)
    assert found["norms"] == [0.0, 0.0, 0.0]
    assert found["overlap"] == [[None] * 3] * 3
    assert {linear["overlap"] for linear in found["linears"]} == {None}
    json.dumps(found, allow_nan=False)


def test_a_skill_without_an_update_is_left_out_of_the_overlap() -> None:
    adapter = make_setup(CONFIGS["Poly"]).adapter
    before = describe_inventory(adapter)
    with torch.no_grad():
        for stack in adapter.inventory.stacks:
            adapter.inventory.stacked(stack, "B")[:, :, 2] = 0.0
    found = describe_inventory(adapter)
    assert found["overlap"][0] == [1.0, pytest.approx(before["overlap"][0][1]), None]
    assert found["linears"][0]["overlap"] == pytest.approx(
        abs(_cosine(update_grams(adapter)[adapter.sites[0].name], 0, 1))
    )


def _cosine(gram: np.ndarray, i: int, j: int) -> float:
    return float(gram[i, j] / np.sqrt(gram[i, i] * gram[j, j]))


def test_private_inventories_compare_every_tasks_update() -> None:
    adapter = make_setup(replace(CONFIGS["LoRA"], private=True)).adapter
    found = describe_inventory(adapter)
    assert (len(found["norms"]), len(found["overlap"])) == (4, 4)
    name = adapter.sites[0].name
    tensors = dict(adapter.inventory.named_tensors())
    last = adapter.config.scale * tensors[f"{name}.A"][3, 0, 0] @ tensors[f"{name}.B"][3, 0, 0]
    assert found["linears"][0]["norms"][3] == pytest.approx(last.norm().item())
