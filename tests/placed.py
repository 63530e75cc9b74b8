"""A model on the CPU as passes take it."""

from collections.abc import Sequence
from typing import Any

import torch

from mhr_scale.adapters.sites import Site
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.table import find_family


def place_model(model: Any, sites: Sequence[Site] = ()) -> PlacedBackbone:
    """The model with the linears of `sites` wrapped, alone on the CPU."""
    return PlacedBackbone(
        engine=Engine({}, timeout_seconds=60.0, device=torch.device("cpu")),
        family=find_family(model.config),
        model=model,
        adapted=wrap(model, sites),
    )
