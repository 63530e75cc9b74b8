"""Statistics of learned routing: sparsity, discreteness, usage of skills, similarity of tasks.

Shape letters: T tasks, G routing groups, Q splits, S skills.

They are computed from the mixing weights used in evaluation, w (T, G, Q, S), whose rows sum to 1,
and from the activations p = sigmoid(z) that these are normalised from. Polytropon (Ponti et al.,
2022) speaks of sparsity, discreteness and usage of its allocation matrix; definitions marked "ours"
are our own.

| figure | of one row | 0 | 1 |
|---|---|---|---|
| entropy | H(w) / ln S, H(w) = - sum_s w_s ln w_s | one skill | all alike |
| sparsity (ours) | Hoyer's: (sqrt S - 1 / |w|_2) / (sqrt S - 1) | all alike | one skill |
| discreteness | 1 - mean over s of H2(p_s), binary entropy in bits | p = 1/2 | on or off |

Effective skills are exp H(w), 1 to S (ours).

The reference code logs the mean of H2 itself as discreteness, and the share of p above 1/2 as
sparsity, which does not detect skills that are used evenly. Each figure is the mean over tasks and
splits, of one group or of all. Usage of a skill is its mean weight; usages sum to 1.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from mhr_scale.adapters import Adapter, routing

#: A task whose relative distance to the mean task is below this (weights are float32) equals it.
SAME = 1e-5
#: Digits of stored cosines: a thousand tasks have a million of them.
DIGITS = 6


def describe_routing(adapter: Adapter) -> dict[str, Any] | None:
    """All figures as plain values; None where there is no table of routing logits."""
    if adapter.routing_logits is None:
        return None
    logits_TGQS = adapter.routing_logits.detach().cpu()
    w_TGQS = routing.mixing_weights(logits_TGQS, adapter.config.routing, seeds=None).double()
    p_TGQS = torch.sigmoid(logits_TGQS.double())
    rows = row_figures(w_TGQS, p_TGQS)
    groups = [
        {
            "name": name,
            **{key: value[:, number].mean().item() for key, value in rows.items()},
            "usage": w_TGQS[:, number].mean((0, 1)).tolist(),
        }
        for number, name in enumerate(adapter.groups)
    ]
    similarity = task_similarity(w_TGQS)
    matrix = np.round(similarity, DIGITS).tolist()
    return {
        **{key: value.mean().item() for key, value in rows.items()},
        "groups": groups,
        "usage": w_TGQS.mean((0, 1, 2)).tolist(),
        "similarity": {"order": clustered_order(similarity), "matrix": matrix},
    }


def row_figures(w_TGQS: Tensor, p_TGQS: Tensor) -> dict[str, Tensor]:
    """Sparsity, discreteness, entropy and effective skills of every row, (T, G, Q) each."""
    n_skills = w_TGQS.shape[-1]
    entropy = torch.special.entr(w_TGQS).sum(-1)
    root = n_skills**0.5
    sparsity = (root - 1.0 / w_TGQS.norm(dim=-1)) / (root - 1.0)
    bits = (torch.special.entr(p_TGQS) + torch.special.entr(1.0 - p_TGQS)) / np.log(2.0)
    return {
        "sparsity": sparsity.clamp(0.0, 1.0),
        "discreteness": 1.0 - bits.mean(-1),
        "entropy": (entropy / np.log(n_skills)).clamp(0.0, 1.0),
        "effective_skills": entropy.exp(),
    }


def task_similarity(w_TGQS: Tensor) -> NDArray[np.float64]:
    """Cosines of the tasks' weights after the mean task is subtracted, (T, T); ours.

    Weights are positive and sum to 1, so their plain cosines are all near 1 and do not separate
    tasks. A task that equals the mean task has no direction: its cosine is 1 to every other such
    task (a single task, or all the same) and 0 to the rest.
    """
    x_TD = w_TGQS.flatten(1)
    deviations = x_TD - x_TD.mean(0)
    norms = deviations.norm(dim=1)
    is_mean = norms <= SAME * x_TD.norm(dim=1)
    units = deviations / norms.masked_fill(is_mean, torch.inf)[:, None]
    cosines = units @ units.T
    cosines = ((cosines + cosines.T) / 2.0).clamp(-1.0, 1.0)
    cosines[is_mean[:, None] & is_mean] = 1.0
    similarity: NDArray[np.float64] = cosines.fill_diagonal_(1.0).numpy()
    return similarity


def clustered_order(cosines: NDArray[np.float64]) -> list[int]:
    """Leaves of an average-linkage clustering by 1 - cosine, in the optimal leaf order.

    One or two tasks keep their order.
    """
    if len(cosines) < 3:
        return list(range(len(cosines)))
    distances = np.clip(1.0 - cosines, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    return [int(leaf) for leaf in leaves_list(tree)]
