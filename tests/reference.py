"""Slow oracles that share no code with the package: nested loops, one example at a time.

Shape letters: B rows, L tokens, I in features, O out features, R rank, S skills, Q splits, T tasks.
Tensors of one split carry the split's share of a width. Gradients come from torch's autograd
through the loops.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-12


def mixing_weights(logits_QS: Tensor) -> list[list[Tensor]]:
    """Sigmoid of each logit over the sum of its split's sigmoids."""
    weights = []
    for logits_S in logits_QS:
        sigmoids = [1.0 / (1.0 + torch.exp(-logit)) for logit in logits_S]
        total = sum(sigmoids) + EPS
        weights.append([sigmoid / total for sigmoid in sigmoids])
    return weights


def mixed_pair(
    weights: Sequence[Sequence[Tensor | float]], a_QSIR: Tensor, b_QSRO: Tensor
) -> tuple[Tensor, Tensor]:
    """One example's matrices: A's splits below each other, B's splits side by side."""
    a_blocks, b_blocks = [], []
    for split, split_weights in enumerate(weights):
        a_IR = torch.zeros_like(a_QSIR[0, 0])
        b_RO = torch.zeros_like(b_QSRO[0, 0])
        for skill, weight in enumerate(split_weights):
            a_IR = a_IR + weight * a_QSIR[split, skill]
            b_RO = b_RO + weight * b_QSRO[split, skill]
        a_blocks.append(a_IR)
        b_blocks.append(b_RO)
    return torch.cat(a_blocks, 0), torch.cat(b_blocks, 1)


def low_rank_linear(
    x_BLI: Tensor,
    weight_OI: Tensor,
    a_QSIR: Tensor,
    b_QSRO: Tensor,
    logits_TQS: Tensor,
    task_ids: Sequence[int],
    *,
    alpha: float,
) -> Tensor:
    """W x + (alpha / rank) B A x with matrices of each example's own."""
    rows = []
    for x_LI, task in zip(x_BLI, task_ids, strict=True):
        a_IR, b_RO = mixed_pair(mixing_weights(logits_TQS[task]), a_QSIR, b_QSRO)
        delta_IO = (alpha / a_QSIR.shape[-1]) * (a_IR @ b_RO)
        rows.append(x_LI @ (weight_OI.T + delta_IO))
    return torch.stack(rows)


def scaled_linear(
    x_BLI: Tensor, weight_OI: Tensor, l_QSO: Tensor, logits_TQS: Tensor, task_ids: Sequence[int]
) -> Tensor:
    """W x times each example's own mixed (IA)3 vector."""
    rows = []
    for x_LI, task in zip(x_BLI, task_ids, strict=True):
        blocks = []
        for split, split_weights in enumerate(mixing_weights(logits_TQS[task])):
            block_O = torch.zeros_like(l_QSO[0, 0])
            for skill, weight in enumerate(split_weights):
                block_O = block_O + weight * l_QSO[split, skill]
            blocks.append(block_O)
        rows.append((x_LI @ weight_OI.T) * torch.cat(blocks))
    return torch.stack(rows)
