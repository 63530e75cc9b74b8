"""Multi-task adapter training with learned routing over frozen, sharded backbones.

The names here are what another PyTorch program needs; the verbs live in `mhr_scale.verbs`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhr_scale.adapters import Adapter, AdapterConfig, Stream, attach, detach
    from mhr_scale.adapters.artefact import load as load_adapter
    from mhr_scale.adapters.artefact import save as save_adapter
    from mhr_scale.adapters.collapse import average, collapse

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Stream",
    "attach",
    "average",
    "collapse",
    "detach",
    "load_adapter",
    "save_adapter",
]

#: Where the names are imported from when first used: a launch reads its recipe before it imports
#: torch.
_LATER = {
    "Adapter": ("mhr_scale.adapters.methods", "Adapter"),
    "AdapterConfig": ("mhr_scale.adapters.config", "AdapterConfig"),
    "Stream": ("mhr_scale.adapters", "Stream"),
    "attach": ("mhr_scale.adapters.methods", "attach"),
    "detach": ("mhr_scale.adapters", "detach"),
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


def __dir__() -> list[str]:
    return __all__
