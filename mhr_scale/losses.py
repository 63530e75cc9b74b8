"""Training losses as (sum, count): the caller divides once, by the global count.

Shape letters: B batch rows, C answer choices, L tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Loss:
    """A summed loss and the number of things it was summed over (scalars or one per row)."""

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """Sum over count."""
        return self.sum / self.count


def language_model(logits_BLV: Tensor, labels_BL: Tensor, *, label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy of the target tokens in float32, per row: sums (B,) and token counts (B,).

    Labels equal to -100 do not count. Label smoothing spreads its share over the vocabulary.
    """
    token_losses_BL = F.cross_entropy(
        logits_BLV.float().transpose(1, 2),
        labels_BL,
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return Loss(token_losses_BL.sum(1), (labels_BL != IGNORE).sum(1))


@dataclass(frozen=True, slots=True)
class TFewLosses:
    """The three few-shot losses of T-Few and the scores they rank by."""

    lm: Loss
    mc: Loss
    ul: Loss
    scores_BC: Tensor


def tfew(
    logits_BCLV: Tensor,
    choices_BCL: Tensor,
    labels_B: Tensor,
    *,
    pad_id: int = 0,
    length_norm: float = 1.0,
) -> TFewLosses:
    """T-Few's losses over answer choices (method notes 3.3).

    `choices_BCL` holds token ids, end of sequence included, `pad_id` elsewhere; `labels_B` the
    index of the right choice. lm: negative log-likelihood of the right choices' tokens; mc:
    cross-entropy over minus the length-normalised scores; ul: -log(1 - p + 0.01) of the wrong
    choices' tokens. `scores_BC` is each choice's summed negative log-likelihood over
    length ** length_norm; the smallest wins.
    """
    log_p_BCLV = F.log_softmax(logits_BCLV, dim=-1)
    log_p_BCL = log_p_BCLV.gather(-1, choices_BCL.unsqueeze(-1)).squeeze(-1)
    is_token_BCL = choices_BCL != pad_id
    lengths_BC = is_token_BCL.sum(-1)
    nll_BC = -(log_p_BCL * is_token_BCL).sum(-1)
    scores_BC = nll_BC / lengths_BC**length_norm
    is_right_BC = F.one_hot(labels_B, choices_BCL.shape[1]).bool()
    right = Loss(nll_BC[is_right_BC].sum(), lengths_BC[is_right_BC].sum())
    ranked = Loss(
        F.cross_entropy(-scores_BC, labels_B, reduction="sum"),
        torch.tensor(len(labels_B), device=labels_B.device),
    )
    is_wrong_BCL = is_token_BCL & ~is_right_BC.unsqueeze(-1)
    unlikely_BCL = torch.log(1.0 - log_p_BCL.exp() + 0.01)
    wrong = Loss(-(unlikely_BCL * is_wrong_BCL).sum(), is_wrong_BCL.sum())
    return TFewLosses(right, ranked, wrong, scores_BC)
