"""A model as passes take it."""

from collections.abc import Sequence
from typing import Any

import torch

from mhr_scale.adapters.sites import Site
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.table import find_family

CPU = torch.device("cpu")


def place_model(
    model: Any, sites: Sequence[Site] = (), *, device: torch.device = CPU
) -> PlacedBackbone:
    """The model with the linears of `sites` wrapped, alone on the device."""
    return PlacedBackbone(
        engine=Engine({}, timeout_seconds=60.0, device=device),
        family=find_family(model.config),
        model=model.to(device),
        adapted=wrap(model, sites),
    )
