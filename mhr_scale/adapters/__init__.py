"""Adapters: adapted linears, inventory, routing, the layers, and the file formats.

Adapters need torch alone; reading and writing files also needs safetensors. Settings and policies
need neither: a recipe is read before torch is imported.

Other rooms import: artefact, collapse, config, layouts, library, linear, opaque, padding,
peft_files, peft_folders, places, policies, rebuilding, routing, sites, slots, wrapping.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhr_scale.adapters.config import AdapterConfig

if TYPE_CHECKING:
    from mhr_scale.adapters.methods import Adapter, attach
    from mhr_scale.adapters.sites import find_sites
    from mhr_scale.adapters.wrapping import detach
    from mhr_scale.families.sequences import Stream

__all__ = ["CARD", "Adapter", "AdapterConfig", "Stream", "attach", "detach", "find_sites"]

#: The file that says what an adapter is.
CARD = "adapter.json"
#: Where the names that need torch are imported from when first used.
_LATER = {
    "Adapter": "methods",
    "Stream": "row_map",
    "attach": "methods",
    "detach": "wrapping",
    "find_sites": "sites",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return __all__
