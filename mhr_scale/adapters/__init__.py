"""Adapters: slots, the adapted linear, inventories, routing. Needs torch alone."""

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.methods import Adapter, attach
from mhr_scale.adapters.sites import find_sites
from mhr_scale.adapters.wrapping import detach

__all__ = ["Adapter", "AdapterConfig", "attach", "detach", "find_sites"]
