"""Model-based clustering: which tasks' private LoRAs, or routing, are alike (docs/method.md 18).

Tasks are compared by cosines alone. Those of LoRAs are of their updates A B, all linears on top of
each other; k-means runs over points on the sphere that have these cosines.

Shape letters: T tasks, G routing groups, S skills, I and O features, R rank.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor

from mhr_scale.adapters import Adapter, routing
from mhr_scale.analysis.alignment import cosines
from mhr_scale.analysis.inventory_statistics import update_grams
from mhr_scale.analysis.routing_statistics import task_similarity
from mhr_scale.errors import AdapterError

#: Starts of k-means, of which the tightest clusters are kept, and its steps.
STARTS = 20
STEPS = 100


def cluster_tasks(adapter: Adapter, n_clusters: int, *, seed: int = 0) -> tuple[int, ...]:
    """The cluster of every task, numbered in the order of their first tasks.

    By the weights of private LoRAs, else by the routing. Raises `AdapterError` if there are neither
    or fewer tasks than clusters, or if a task has no update.
    """
    n_tasks = len(adapter.task_names)
    if not 2 <= n_clusters <= n_tasks:
        raise AdapterError(f"{n_clusters} clusters of {n_tasks} task(s); set 2 to {n_tasks}")
    return group(_similarity(adapter), n_clusters, seed=seed)


def _similarity(adapter: Adapter) -> NDArray[np.float64]:
    """Cosines of the tasks (T, T)."""
    if adapter.config.private and not adapter.config.is_routed:
        found = cosines(np.stack(list(update_grams(adapter).values())).sum(0))
        unknown = np.flatnonzero(np.isnan(np.diag(found)))
        if len(unknown):
            raise AdapterError(
                f"task '{adapter.task_names[unknown[0]]}' has an update of zero, which is like no "
                "other; train it first"
            )
        return found
    if adapter.routing_logits is None or adapter.config.private:
        raise AdapterError(
            f"tasks are clustered by private LoRAs (adapter.private, one skill) or by routing; "
            f"this is {adapter.config.method}"
        )
    logits_TGQS = adapter.routing_logits.detach().cpu()
    w_TGQS = routing.mixing_weights(logits_TGQS, adapter.config.routing, seeds=None)
    return task_similarity(w_TGQS.double())


def group(similarity: NDArray[np.float64], n_clusters: int, *, seed: int) -> tuple[int, ...]:
    """Clusters of points with these cosines (T, T), by k-means; always the same of a seed."""
    values, vectors = np.linalg.eigh(similarity)
    points_TT = vectors * np.sqrt(values.clip(min=0.0))
    random, best, tightest = np.random.default_rng(seed), None, np.inf
    for _ in range(STARTS):
        centres, labels = kmeans2(
            points_TT, n_clusters, iter=STEPS, minit="++", missing="raise", rng=random
        )
        spread = float(((points_TT - centres[labels]) ** 2).sum())
        if spread < tightest - 1e-12:
            best, tightest = labels, spread
    assert best is not None
    order = list(dict.fromkeys(best.tolist()))
    return tuple(order.index(label) for label in best.tolist())


def members(skilled: Adapter) -> dict[str, list[str]]:
    """The tasks of every skill that `to_skills` has made."""
    assert skilled.routing_logits is not None
    joined = skilled.routing_logits[:, 0, 0].argmax(-1).tolist()
    return by_cluster(skilled.task_names, joined)


def by_cluster(names: Sequence[str], joined: Sequence[int]) -> dict[str, list[str]]:
    """The names of every cluster's tasks."""
    return {
        str(number): [name for name, own in zip(names, joined, strict=True) if own == number]
        for number in range(max(joined) + 1)
    }


@torch.no_grad()
def to_skills(adapter: Adapter, clusters: Sequence[int], *, logit: float) -> Adapter:
    """A skill for each cluster, the mean update of its LoRAs at their rank, and tasks routed to it.

    Every task has `logit` for the skill that it joined and -`logit` for the others, under policy
    fixed. A cluster of one has that LoRA as it is. Raises `AdapterError` for other adapters.
    """
    if not adapter.config.private or adapter.config.is_routed or adapter.config.kind != "lora":
        raise AdapterError(
            "skills are made of clusters of private LoRAs (adapter.private, one skill); this is "
            f"{adapter.config.method} of kind {adapter.config.kind}"
        )
    n_skills = max(clusters) + 1
    config = replace(adapter.config, private=False, n_skills=n_skills, policy="fixed")
    skilled = Adapter(config, adapter.sites, task_names=adapter.task_names)
    assert skilled.routing_logits is not None
    joined = torch.tensor(clusters)
    signs_TS = 2.0 * torch.nn.functional.one_hot(joined, n_skills) - 1.0
    skilled.routing_logits.copy_(logit * signs_TS[:, None, None].expand_as(skilled.routing_logits))
    for stack in adapter.inventory.stacks:
        sides = (adapter.inventory.stacked(stack, side)[:, :, 0, 0].cpu() for side in "AB")
        a_NTIR, b_NTRO = sides
        for skill in range(n_skills):
            members = (joined == skill).nonzero()[:, 0]
            for n in range(len(stack.members)):
                a, b = _mean_update(a_NTIR[n, members], b_NTRO[n, members])
                skilled.inventory.stacked(stack, "A")[n, 0, skill] = a
                skilled.inventory.stacked(stack, "B")[n, 0, skill] = b
    return skilled


def _mean_update(a_TIR: Tensor, b_TRO: Tensor) -> tuple[Tensor, Tensor]:
    """A pair of the same rank next to the mean of the updates A B, by its singular values."""
    if len(a_TIR) == 1:
        return a_TIR[0], b_TRO[0]
    rank = a_TIR.shape[-1]
    left, a_small = torch.linalg.qr(a_TIR.double().transpose(0, 1).flatten(1))
    right, b_small = torch.linalg.qr(b_TRO.double().flatten(0, 1).T / len(a_TIR))
    u, values, v = torch.linalg.svd(a_small @ b_small.T, full_matrices=False)
    root = values[:rank].sqrt()
    return left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ right.T)
