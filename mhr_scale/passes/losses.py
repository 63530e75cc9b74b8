"""Training losses as (sum, count): the caller divides once, by the global count.

Shape letters: B batch rows, C answer choices, D target positions with choices side by side, V
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mhr_scale.families.packed import IGNORE, Targets

#: Logits that are had in float32 at a time: 16 MiB of them.
CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Loss:
    """A summed loss and the number of terms in the sum (scalars, or one per row)."""

    sum: Tensor
    count: Tensor


def token_losses(
    logits: Tensor,
    labels_BD: Tensor,
    sources: Tensor | Targets | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy (B, D) in float32, 0 where a label is -100; in float64 if the logits are.

    `sources` tells which of the logits a label is of (`Packed.sources`). Where the vocabulary is
    large, a step's largest tensors are these logits. They are kept as they are, for backward too,
    and had in float32 some rows at a time: the numbers are those of torch's function over all.
    """
    labels_N, rows_N = _targets(logits, labels_BD, sources)
    losses_N: Tensor = _TokenLosses.apply(logits.flatten(0, -2), labels_N, rows_N, label_smoothing)
    return _spread(losses_N, labels_BD, sources)


def are_likeliest(
    logits: Tensor, labels_BD: Tensor, sources: Tensor | Targets | None = None
) -> Tensor:
    """Whether each label is the one with the largest logit (B, D); of no meaning where padded."""
    labels_N, rows_N = _targets(logits, labels_BD, sources)
    best_N = logits.flatten(0, -2).argmax(-1)
    return _spread((best_N if rows_N is None else best_N[rows_N]) == labels_N, labels_BD, sources)


def _targets(
    logits: Tensor, labels_BD: Tensor, sources: Tensor | Targets | None
) -> tuple[Tensor, Tensor | None]:
    """The labels one behind another, and the rows of the logits that they are of (None: so)."""
    labels_N = labels_BD.flatten()
    if isinstance(sources, Targets):
        return labels_N[sources.places_N], sources.sources_N
    if sources is None:
        return labels_N, None
    first_B1 = torch.arange(len(sources), device=sources.device)[:, None]
    return labels_N, (sources + first_B1 * logits.shape[1]).flatten()


def _spread(values_N: Tensor, labels_BD: Tensor, sources: Tensor | Targets | None) -> Tensor:
    """Values of the labels where these lie, 0 where padded."""
    if isinstance(sources, Targets):
        padded = values_N.new_zeros(labels_BD.numel())
        values_N = padded.index_copy(0, sources.places_N, values_N)
    return values_N.view_as(labels_BD)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of rows of logits (N, V); their softmax is computed anew in backward."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, places_N: Tensor | None, smoothing: float
    ) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N, places_N)
        ctx.smoothing = smoothing
        parts = [
            F.cross_entropy(
                _wide(logits_NV[rows]),
                labels_N[chunk],
                ignore_index=IGNORE,
                reduction="none",
                label_smoothing=smoothing,
            )
            for chunk, rows in _chunks(labels_N, places_N, width=logits_NV.shape[1])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, labels_N, places_N = ctx.saved_tensors
        smoothing = ctx.smoothing
        make = torch.empty_like if places_N is None else torch.zeros_like
        d_logits_NV = make(logits_NV)
        for chunk, rows in _chunks(labels_N, places_N, width=logits_NV.shape[1]):
            labels = labels_N[chunk]
            g = torch.where(labels != IGNORE, gradient_N[chunk], 0.0)[:, None]
            # a smoothed target has probabilities that sum to one, too
            d = torch.log_softmax(_wide(logits_NV[rows]), -1).exp_().mul_(g)
            if smoothing:
                d.sub_(g * (smoothing / d.shape[-1]))
            d.scatter_add_(-1, labels.clamp(min=0)[:, None], g * (smoothing - 1.0))
            if places_N is None:
                d_logits_NV[rows].copy_(d)
            else:
                d_logits_NV.index_add_(0, rows, d.to(d_logits_NV.dtype))
        return d_logits_NV, None, None, None


def _chunks(
    labels_N: Tensor, places_N: Tensor | None, *, width: int
) -> Iterator[tuple[slice, Any]]:
    """So many labels at a time that their logits fill a chunk, and which rows those are."""
    size = max(1, CHUNK // width)
    for start in range(0, max(len(labels_N), 1), size):
        chunk = slice(start, start + size)
        yield chunk, chunk if places_N is None else places_N[chunk]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def language_model(
    logits: Tensor,
    labels_BD: Tensor,
    sources: Tensor | Targets | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Loss:
    """Cross-entropy of the target tokens in float32, per row: sums (B,) and token counts (B,).

    Labels equal to -100 do not count. Label smoothing spreads its share over the vocabulary.
    """
    token_losses_BD = token_losses(logits, labels_BD, sources, label_smoothing=label_smoothing)
    return Loss(token_losses_BD.sum(1), (labels_BD != IGNORE).sum(1))


@dataclass(frozen=True, slots=True)
class TFewLosses:
    """The three few-shot losses of T-Few, per row, and the scores they rank by."""

    lm: Loss
    mc: Loss
    ul: Loss
    scores_BC: Tensor


def tfew(
    logits: Tensor,
    labels_BD: Tensor,
    choices_BD: Tensor,
    right_B: Tensor,
    sources: Tensor | Targets | None = None,
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
    nll_BD = token_losses(logits, labels_BD, sources)
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
