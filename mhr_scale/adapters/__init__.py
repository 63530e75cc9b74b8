"""Adapters: slots, the adapted linear, inventories, routing. Needs torch alone."""

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.layout import FAMILIES, find_sites
from mhr_scale.adapters.methods import Adapter, attach, detach

__all__ = ["FAMILIES", "Adapter", "AdapterConfig", "attach", "detach", "find_sites"]
