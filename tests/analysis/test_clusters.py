"""Clusters of tasks: made ones are found again, and become skills."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mhr_scale.adapters import Adapter, AdapterConfig, artefact
from mhr_scale.adapters.collapse import collapse
from mhr_scale.adapters.library import route_by_token
from mhr_scale.adapters.sites import Site
from mhr_scale.analysis.clusters import cluster_tasks, group, members, to_skills
from mhr_scale.config import AnalyseConfig, ExportConfig, PlainRunConfig
from mhr_scale.config.export import ClustersConfig
from mhr_scale.errors import AdapterError, ConfigError
from mhr_scale.verbs.analyse import analyse
from mhr_scale.verbs.export import export

LORAS = AdapterConfig(n_skills=1, rank=2, alpha=3.0, private=True)
SITES = tuple(
    Site(name=f"{n}.q", in_features=12, out_features=10, stack="decoder", block=n, sublayer=0)
    for n in range(2)
)
#: Of six tasks, whose LoRA is near which; the last is alone.
NEAR = (0, 1, 0, 1, 1, 2)


def make_library(config: AdapterConfig = LORAS) -> Adapter:
    """Tasks that are alike have the same update but for a little, at another size, factored else"""
    library = Adapter(config, SITES, task_names=[f"task {n}" for n in range(len(NEAR))])
    generator = torch.Generator().manual_seed(0)
    for stack in library.inventory.stacks:
        a, b = (library.inventory.stacked(stack, side).data for side in "AB")
        kinds = [
            torch.randn(side[:, 0].shape, generator=generator) for side in (a, b) for _ in range(3)
        ]
        for task, kind in enumerate(NEAR):
            turn = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0] * (task + 1)
            noise = 0.05 * torch.randn(a[:, 0].shape, generator=generator)
            a[:, task] = (kinds[kind] + noise) @ turn
            b[:, task] = torch.linalg.inv(turn) @ kinds[3 + kind] * (1 + task)
    return library


def update(adapter: Adapter, site: str) -> torch.Tensor:
    stored = dict(adapter.inventory.named_tensors())
    return adapter.config.scale * stored[f"{site}.A"][0, 0] @ stored[f"{site}.B"][0, 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_made_clusters_are_found_whatever_their_factors(seed: int) -> None:
    assert cluster_tasks(make_library(), 3, seed=seed) == NEAR


def test_skills_are_the_best_mean_updates_and_tasks_are_routed_to_them() -> None:
    library = make_library()
    skilled = to_skills(library, NEAR, logit=20.0)
    assert members(skilled) == {
        "0": ["task 0", "task 2"],
        "1": ["task 1", "task 3", "task 4"],
        "2": ["task 5"],
    }
    for task, cluster in zip(library.task_names, NEAR, strict=True):
        for site in ("0.q", "1.q"):
            own = [library.task_names[n] for n, c in enumerate(NEAR) if c == cluster]
            mean = torch.stack([update(collapse(library, one), site) for one in own]).mean(0)
            u, values, v = torch.linalg.svd(mean, full_matrices=False)
            best = u[:, :2] * values[:2] @ v[:2]
            found = update(collapse(skilled, task), site)
            torch.testing.assert_close(found, best, rtol=0, atol=1e-5 * best.abs().max().item())


def test_routing_has_clusters_of_its_own() -> None:
    assert cluster_tasks(to_skills(make_library(), NEAR, logit=3.0), 3) == NEAR


def test_tokens_choose_among_the_skills_of_clusters() -> None:
    library = route_by_token(to_skills(make_library(), NEAR, logit=3.0), top_k=2)
    assert library.task_names == ("skill 0", "skill 1", "skill 2")


def test_what_has_no_clusters_is_refused() -> None:
    library = make_library()
    with pytest.raises(AdapterError, match=r"7 clusters of 6 task\(s\); set 2 to 6"):
        cluster_tasks(library, 7)
    plain = Adapter(replace(LORAS, private=False), SITES, task_names=["a", "b"])
    with pytest.raises(AdapterError, match="clustered by private LoRAs"):
        cluster_tasks(plain, 2)
    with pytest.raises(AdapterError, match="made of clusters of private LoRAs"):
        to_skills(plain, (0, 1), logit=20.0)
    for side in ("A_12x10", "B_12x10"):
        library.inventory.get_parameter(side).data[:, 3] = 0.0
    with pytest.raises(AdapterError, match="'task 3' has an update of zero"):
        cluster_tasks(library, 3)
    assert len(set(group(np.eye(4), 4, seed=0))) == 4


def test_export_writes_who_joined_what_and_analyse_says_it(tmp_path: Path) -> None:
    artefact.save(make_library(), tmp_path / "library")
    config = ExportConfig(
        adapter=str(tmp_path / "library"),
        what="clusters",
        clusters=ClustersConfig(number=3),
        format="native",
        folder=str(tmp_path / "skills"),
        check=False,
    )
    export(config)
    joined = json.loads((tmp_path / "skills" / "clusters.json").read_text())
    assert joined == members(artefact.load(tmp_path / "skills"))
    for name in ("library", "skills"):
        folder = tmp_path / f"analysis of {name}"
        analyse(
            AnalyseConfig(
                adapter=str(tmp_path / name),
                alignment=None,
                clusters=3,
                run=PlainRunConfig(folder=str(folder)),
            )
        )
        assert json.loads((folder / "analysis.json").read_text())["clusters"] == joined
    with pytest.raises(ConfigError, match="clusters: say how many"):
        replace(config, clusters=None)
