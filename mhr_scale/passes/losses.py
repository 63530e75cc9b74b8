"""Training losses as (sum, count): the caller divides once, by the global count.

Shape letters: B batch rows, C answer choices, D target positions with choices side by side, V
vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.families.packed import IGNORE


@dataclass(frozen=True, slots=True)
class Loss:
    """A summed loss and the number of terms in the sum (scalars, or one per row)."""

    sum: Tensor
    count: Tensor


def language_model(logits_BDV: Tensor, labels_BD: Tensor, *, label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy of the target tokens in float32, per row: sums (B,) and token counts (B,).

    Labels equal to -100 do not count. Label smoothing spreads its share over the vocabulary.
    """
    token_losses_BD = F.cross_entropy(
        logits_BDV.float().transpose(1, 2),
        labels_BD,
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return Loss(token_losses_BD.sum(1), (labels_BD != IGNORE).sum(1))


@dataclass(frozen=True, slots=True)
class TFewLosses:
    """The three few-shot losses of T-Few, per row, and the scores they rank by."""

    lm: Loss
    mc: Loss
    ul: Loss
    scores_BC: Tensor


def tfew(
    logits_BDV: Tensor,
    labels_BD: Tensor,
    choices_BD: Tensor,
    right_B: Tensor,
    *,
    n_choices: int,
    length_norm: float = 1.0,
) -> TFewLosses:
    """T-Few's losses over packed answer choices, any number per row (docs/method.md 11).

    `choices_BD` is the choice that a position belongs to, -1 where padded; `labels_BD` the token to
    predict there, end of sequence included; `right_B` the right choice. lm: negative log-likelihood
    of the right choices' tokens; mc: cross-entropy over minus the length-normalised scores, once
    per row; ul: -log(1 - p + 0.01) of the wrong choices' tokens. `scores_BC` is each choice's
    summed negative log-likelihood over length ** length_norm, infinite where a row has no such
    choice; the smallest wins.

    `n_choices` is the most that a row has. Likelihoods are float32, or float64 if the logits are.
    """
    logits_BDV = logits_BDV if logits_BDV.dtype == torch.float64 else logits_BDV.float()
    nll_BD = F.cross_entropy(
        logits_BDV.flatten(0, 1), labels_BD.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(labels_BD)
    is_choice_BDC = choices_BD.unsqueeze(-1) == torch.arange(n_choices, device=choices_BD.device)
    lengths_BC = is_choice_BDC.sum(1)
    nll_BC = (nll_BD.unsqueeze(-1) * is_choice_BDC).sum(1)
    # in double: a power in float32 rounds by its place in the tensor, that is, by who is beside it
    divisors_BC = lengths_BC.clamp(min=1).double() ** length_norm
    scores_BC = nll_BC / divisors_BC.to(nll_BC.dtype)
    scores_BC = scores_BC.masked_fill(lengths_BC == 0, torch.inf)
    ranked_B = F.cross_entropy(-scores_BC, right_B, reduction="none")
    is_right_BD = choices_BD == right_B.unsqueeze(-1)
    is_wrong_BD = (choices_BD >= 0) & ~is_right_BD
    unlikely_BD = -torch.log(1.0 - torch.exp(-nll_BD) + 0.01)
    return TFewLosses(
        Loss((nll_BD * is_right_BD).sum(1), is_right_BD.sum(1)),
        Loss(ranked_B, torch.ones_like(right_B)),
        Loss((unlikely_BD * is_wrong_BD).sum(1), is_wrong_BD.sum(1)),
        scores_BC,
    )
