"""Linears of one module that read the same input, called together.

A module says which of its children do (`shared_inputs = (("q", "k", "v"),)`) and calls them through
`call_together`. Where adapters are attached they stand in the module a second time, as one.
"""

from torch import Tensor, nn


def call_together(parent: nn.Module, names: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of the named children of `parent`, which read the same x."""
    siblings = parent._modules.get(siblings_name(names))
    if siblings is not None:
        return siblings(x)
    return tuple(parent.get_submodule(name)(x) for name in names)


def siblings_name(names: tuple[str, ...]) -> str:
    """Name under which siblings stand in their parent."""
    return "siblings_" + "_".join(names)
