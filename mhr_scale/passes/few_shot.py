"""A training pass: some rows through the model, and what the protocol makes of their losses.

Shape letters: B batch rows, D decoder positions with choices side by side, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhr_scale.config import ProtocolConfig
from mhr_scale.jobs.job_data import TrainRow
from mhr_scale.passes import losses
from mhr_scale.passes.losses import IGNORE, Loss
from mhr_scale.passes.scoring import run_choices


def forward(
    protocol: ProtocolConfig,
    model: Any,
    rows: Sequence[TrainRow],
    mean: Callable[[str, Loss], Tensor],
    *,
    device: torch.device,
    at_least: tuple[int, int] = (0, 0),
) -> dict[str, Tensor]:
    """The `loss` of some rows, and under T-Few its parts `lm`, `mc` and `ul`.

    `mean` divides the sums of a part by what counts: per job of a wave, or, where one job's batch
    takes several passes, by the counts of the whole batch, which `count` gives. Inputs and decoder
    rows are padded to the lengths `at_least`, or wider.
    """
    inputs, choices = [row.input_ids for row in rows], [row.choices for row in rows]
    logits_BDV, packed = run_choices(model, inputs, choices, device=device, at_least=at_least)
    if protocol.loss == "language_model":
        labels_BD = packed.targets_BD.masked_fill(packed.blocks_BD < 0, IGNORE)
        found = losses.language_model(
            logits_BDV, labels_BD, label_smoothing=protocol.label_smoothing
        )
        if protocol.normalise == "examples":
            found = Loss(found.sum, torch.ones_like(found.count))
        return {"loss": mean("lm", found)}
    three = losses.tfew(
        logits_BDV,
        packed.targets_BD,
        packed.blocks_BD,
        torch.tensor([row.label for row in rows], device=logits_BDV.device),
        n_choices=packed.n_choices,
        length_norm=protocol.length_norm,
    )
    lm, mc, ul = mean("lm", three.lm), mean("mc", three.mc), mean("ul", three.ul)
    total = lm + protocol.mc_weight * mc + protocol.ul_weight * ul
    return {"loss": total, "lm": lm, "mc": mc, "ul": ul}


def count(rows: Sequence[TrainRow], protocol: ProtocolConfig) -> dict[str, int]:
    """What the loss of a batch, or each part of T-Few's, is divided by."""
    right = sum(len(row.choices[row.label]) for row in rows)
    if protocol.loss == "t_few":
        every = sum(row.n_choice_tokens for row in rows)
        return {"lm": right, "mc": len(rows), "ul": every - right}
    return {"lm": right if protocol.normalise == "tokens" else len(rows)}
