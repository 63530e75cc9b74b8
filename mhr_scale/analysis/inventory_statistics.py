"""Statistics of the inventory: the size of the skills' updates, and how much they overlap.

Shape letters: N linears of one shape, Q splits, S skills, R rank, I and O features of one split,
K updates that are compared: one per skill, or per task and skill where inventories are private.

A skill's update of a linear is the matrix that is added to the weight if a task uses this skill
alone in every split: (alpha / r) A_s B_s with A_s the splits' A on top of each other (Q * I, R) and
B_s the splits' B side by side (R, Q * O). Its blocks (q, q') are A_qs B_q's. Inner products need no
such matrix: <A_s B_s, A_s' B_s'> = sum_ij (A_s^T A_s')_ij (B_s B_s'^T)_ij, where both factors are
sums over splits. For (IA)3 the update is that of the scaling vector, l - 1.

The overlap of two skills is |cos| of their updates, 0 to 1. An update of zero (B is zero at the
start) has no overlap, and is left out of means.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhr_scale.adapters import Adapter
from mhr_scale.analysis.alignment import Matrix, cosines, mean_of_pairs


def describe_inventory(adapter: Adapter) -> dict[str, Any]:
    """Norms and overlaps as plain values; None: an overlap that is defined in no linear."""
    grams = update_grams(adapter)
    norms = {name: np.sqrt(np.diag(gram).clip(min=0.0)) for name, gram in grams.items()}
    overlaps = {name: np.abs(cosines(gram)) for name, gram in grams.items()}
    stacked = np.stack(list(overlaps.values()))
    known = ~np.isnan(stacked)
    counts = known.sum(0)
    mean = np.where(known, stacked, 0.0).sum(0) / np.where(counts, counts, 1)
    return {
        "linears": [
            {
                "name": name,
                "norms": norms[name].tolist(),
                "overlap": mean_of_pairs(overlaps[name]),
            }
            for name in grams
        ],
        "overlap": [
            [float(value) if count else None for value, count in zip(*row, strict=True)]
            for row in zip(mean, counts, strict=True)
        ],
        "norms": np.stack(list(norms.values())).mean(0).tolist(),
    }


def update_grams(adapter: Adapter) -> dict[str, Matrix]:
    """Inner products (K, K) of the skills' updates per linear, in the order of the sites."""
    grams: dict[str, Matrix] = {}
    for stack in adapter.inventory.stacks:
        for row, member in enumerate(stack.members):
            sides = [_by_skill(adapter, stack.key, side, row) for side in adapter.inventory.sides]
            gram = _low_rank_gram(*sides) if len(sides) == 2 else _vector_gram(sides[0])
            scale = adapter.config.scale**2 if len(sides) == 2 else 1.0
            grams[adapter.sites[member].name] = (gram * scale).numpy()
    return {site.name: grams[site.name] for site in adapter.sites}


def _by_skill(adapter: Adapter, key: str, side: str, row: int) -> Tensor:
    """One linear's tensor, updates first: (K, Q, I, R), (K, Q, R, O) or (K, Q, O)."""
    tensor = adapter.inventory.get_parameter(f"{side}_{key}").detach()[row].cpu().double()
    if adapter.config.private:  # (T, Q, S, ...)
        return tensor.transpose(1, 2).flatten(0, 1)
    return tensor.transpose(0, 1)


def _low_rank_gram(a_KQIR: Tensor, b_KQRO: Tensor) -> Tensor:
    a_KIR, b_KOR = a_KQIR.flatten(1, 2), b_KQRO.transpose(2, 3).flatten(1, 2)
    left, right = (torch.einsum("kxr,lxs->klrs", side, side) for side in (a_KIR, b_KOR))
    return (left * right).sum((2, 3))


def _vector_gram(l_KQO: Tensor) -> Tensor:
    change_KO = l_KQO.flatten(1) - 1.0
    return change_KO @ change_KO.T
