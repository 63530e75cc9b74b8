"""A single LoRA at a greater rank and on more linears, by zeros: it computes the same."""

from dataclasses import replace

import torch

from mhr_scale.adapters.artefact import named_tensors
from mhr_scale.adapters.config import ALL_BLOCKS
from mhr_scale.adapters.methods import Adapter
from mhr_scale.adapters.sites import Site


@torch.no_grad()
def pad(single: Adapter, *, rank: int, sites: tuple[Site, ...]) -> Adapter:
    """Return a single LoRA with `rank` columns on `sites`, those of its own layout in all blocks.

    What is new is zero in A and in B, and alpha grows with the rank, so that the scale stays.
    """
    config = single.config
    assert config.kind == "lora"
    assert rank >= config.rank
    alpha = config.alpha * rank / config.rank
    wider = replace(config, rank=rank, alpha=alpha, blocks=ALL_BLOCKS)
    padded = Adapter(wider, sites, task_names=single.task_names)
    stored = named_tensors(single)
    for name, tensor in named_tensors(padded).items():
        tensor.zero_()
        if (known := stored.pop(name, None)) is not None:
            tensor[tuple(slice(size) for size in known.shape)].copy_(known)
    assert not stored
    return padded
