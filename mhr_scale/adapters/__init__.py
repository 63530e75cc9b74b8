"""Adapters: sites, inventory, routing, slots, products; their files. Needs torch alone.

Other rooms import: artefact, collapse, config, linear, peft_folders, reference_checkpoints,
routing, sites, wrapping.
"""

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.methods import Adapter, attach
from mhr_scale.adapters.sites import find_sites
from mhr_scale.adapters.wrapping import detach

__all__ = ["Adapter", "AdapterConfig", "attach", "detach", "find_sites"]
