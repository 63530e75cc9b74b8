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
    from mhr_scale.exchange.from_peft import from_peft
    from mhr_scale.exchange.routed_trainer import RoutedTrainer

__all__ = [
    "Adapter",
    "AdapterConfig",
    "RoutedTrainer",
    "Stream",
    "attach",
    "average",
    "collapse",
    "detach",
    "from_peft",
    "load_adapter",
    "save_adapter",
]

#: Where the names are imported from when first used: a launch reads its recipe before it imports
#: torch.
_LATER = {
    "Adapter": ("mhr_scale.adapters.methods", "Adapter"),
    "AdapterConfig": ("mhr_scale.adapters.config", "AdapterConfig"),
    "RoutedTrainer": ("mhr_scale.exchange.routed_trainer", "RoutedTrainer"),
    "Stream": ("mhr_scale.adapters", "Stream"),
    "attach": ("mhr_scale.adapters.methods", "attach"),
    "detach": ("mhr_scale.adapters", "detach"),
    "average": ("mhr_scale.adapters.collapse", "average"),
    "collapse": ("mhr_scale.adapters.collapse", "collapse"),
    "from_peft": ("mhr_scale.exchange.from_peft", "from_peft"),
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
