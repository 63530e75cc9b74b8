"""The forward pass of few-shot jobs, and the protocol's loss.

Shape letters: B batch rows, D target positions with choices side by side, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mhr_scale.config import ProtocolConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.families.sending import send_numbers
from mhr_scale.passes import losses
from mhr_scale.passes.losses import Loss


def forward(
    protocol: ProtocolConfig,
    placed: PlacedBackbone,
    packed: Packed,
    mean: Callable[[str, Loss], Tensor],
) -> dict[str, Tensor]:
    """The `loss` of some rows, and under T-Few its parts `lm`, `mc` and `ul`.

    `mean` divides the sum of a part by its count: per job of a wave, or, if one job's batch takes
    several passes, by the counts of the whole batch (`count`).
    """
    logits = placed.predictions(packed)
    if protocol.loss == "language_model":
        loss = losses.language_model(
            logits,
            packed.labels_BD,
            packed.sources,
            label_smoothing=protocol.label_smoothing,
        )
        if protocol.normalise == "examples":
            loss = Loss(loss.sum, torch.ones_like(loss.count))
        return {"loss": mean("lm", loss)}
    parts = losses.tfew(
        logits,
        packed.labels_BD,
        packed.choices_BD,
        send_numbers([row.label for row in packed.rows], logits.device),
        packed.sources,
        n_choices=packed.n_choices,
        length_norm=protocol.length_norm,
    )
    lm, mc, ul = mean("lm", parts.lm), mean("mc", parts.mc), mean("ul", parts.ul)
    total = lm + protocol.mc_weight * mc + protocol.ul_weight * ul
    return {"loss": total, "lm": lm, "mc": mc, "ul": ul}


def count(rows: Sequence[EncodedRow], protocol: ProtocolConfig) -> dict[str, int]:
    """The divisor of a batch's loss, or of each part of T-Few's; 1 where nothing counts."""
    right = sum(len(row.answers[row.label]) for row in rows)
    if protocol.loss == "t_few":
        total = sum(row.n_answer_tokens for row in rows)
        return {"lm": right, "mc": len(rows), "ul": max(1, total - right)}
    return {"lm": right if protocol.normalise == "tokens" else len(rows)}
