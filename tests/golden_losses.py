"""T-Few's losses of the choices in a golden file (`golden_vectors`), on any device."""

from types import SimpleNamespace

import torch

from mhr_scale.families.packed import IGNORE
from mhr_scale.passes.losses import TFewLosses, tfew

CPU = torch.device("cpu")


def find(losses: SimpleNamespace, device: torch.device = CPU) -> TFewLosses:
    """The losses of the same choices side by side: (B, C, L) as (B, C * L), padding in between."""
    tensors = {name: tensor.to(device) for name, tensor in losses.tensors.items()}
    choices_BCL = tensors["choices"]
    blocks_C1 = torch.arange(choices_BCL.shape[1], device=device).unsqueeze(-1)
    is_padding_BCL = choices_BCL == losses.meta["pad_id"]
    return tfew(
        tensors["logits"].flatten(1, 2),
        choices_BCL.masked_fill(is_padding_BCL, IGNORE).flatten(1),
        torch.where(is_padding_BCL, -1, blocks_C1).flatten(1),
        tensors["labels"],
        n_choices=choices_BCL.shape[1],
        length_norm=losses.meta["length_norm"],
    )
