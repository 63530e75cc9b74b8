"""Adapters: adapted linears, inventory, routing, the layers, and the file formats.

Importing it needs torch alone; reading and writing files also needs safetensors.

Other rooms import: artefact, collapse, config, linear, peft_files, peft_folders, rebuilding,
routing, sites, wrapping.
"""

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.methods import Adapter, attach
from mhr_scale.adapters.sites import find_sites
from mhr_scale.adapters.wrapping import detach

__all__ = ["Adapter", "AdapterConfig", "attach", "detach", "find_sites"]
