"""Multi-task adapter training with learned routing over frozen, sharded T5 backbones.

The names here are what another PyTorch program needs; the verbs live in `mhr_scale.verbs`.
"""

from importlib import import_module
from typing import Any

from mhr_scale.adapters import Adapter, AdapterConfig, attach, detach

__all__ = [
    "Adapter",
    "AdapterConfig",
    "attach",
    "average",
    "collapse",
    "detach",
    "load_adapter",
    "save_adapter",
]

#: Names that need more than torch, imported when first used.
_LATER = {
    "average": ("mhr_scale.adapters.collapse", "average"),
    "collapse": ("mhr_scale.adapters.collapse", "collapse"),
    "load_adapter": ("mhr_scale.adapters.artefact", "load"),
    "save_adapter": ("mhr_scale.adapters.artefact", "save"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mhr_scale' has no attribute '{name}'")
    module, attribute = _LATER[name]
    return getattr(import_module(module), attribute)
