"""Adapters: slots, the adapted linear, inventories, routing. Needs torch alone."""

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.methods import Adapter, attach, detach
from mhr_scale.adapters.sites import FAMILIES, find_sites

__all__ = ["FAMILIES", "Adapter", "AdapterConfig", "attach", "detach", "find_sites"]
