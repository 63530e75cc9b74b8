"""One job's batch in several passes: each gives its share of the loss, divided by the whole count.

Shape letters: B batch rows, D decoder positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhr_scale import losses
from mhr_scale.config import ProtocolConfig
from mhr_scale.jobs.data import TrainRow
from mhr_scale.losses import IGNORE
from mhr_scale.scoring import pack_choices, pad_inputs


def count(rows: Sequence[TrainRow], protocol: ProtocolConfig) -> dict[str, int]:
    """What the loss of a batch, or each part of T-Few's, is divided by."""
    right = sum(len(row.choices[row.label]) for row in rows)
    if protocol.loss == "t_few":
        every = sum(row.n_choice_tokens for row in rows)
        return {"lm": right, "mc": len(rows), "ul": every - right}
    return {"lm": right if protocol.normalise == "tokens" else len(rows)}


def forward(
    protocol: ProtocolConfig,
    model: Any,
    rows: Sequence[TrainRow],
    counts: dict[str, int],
    *,
    device: torch.device,
) -> dict[str, Tensor]:
    """The share of some rows in the loss of their batch, and in its parts: numbers to be added."""
    pad_id = model.config.pad_token_id
    packed = pack_choices(
        [row.choices for row in rows],
        start_id=model.config.decoder_start_token_id,
        pad_id=pad_id,
        device=device,
    )
    logits_BDV = model(
        **pad_inputs([row.input_ids for row in rows], pad_id=pad_id, device=device),
        decoder_input_ids=packed.decoder_input_ids_BD,
        decoder_attention_mask=packed.mask(model.get_input_embeddings().weight.dtype),
        use_cache=False,
    ).logits
    if protocol.loss == "language_model":
        labels_BD = packed.targets_BD.masked_fill(packed.blocks_BD < 0, IGNORE)
        found = losses.language_model(
            logits_BDV, labels_BD, label_smoothing=protocol.label_smoothing
        )
        return {"loss": found.sum.sum() / counts["lm"]}
    three = losses.tfew(
        logits_BDV,
        packed.targets_BD,
        packed.blocks_BD,
        torch.tensor([row.label for row in rows], device=device),
        n_choices=packed.n_choices,
        length_norm=protocol.length_norm,
    )
    lm = three.lm.sum.sum() / counts["lm"]
    mc = three.mc.sum.sum() / counts["mc"]
    ul = three.ul.sum.sum() / counts["ul"]
    total = lm + protocol.mc_weight * mc + protocol.ul_weight * ul
    return {"loss": total, "lm": lm, "mc": mc, "ul": ul}
