"""Wrapping a model's linears in place, so that adapters can be bound to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mhr_scale.adapters.linear import AdaptedLinear, Siblings
from mhr_scale.adapters.sites import Site
from mhr_scale.errors import AdapterError
from mhr_scale.families.siblings import siblings_name


class AdaptedModel(Mapping[str, AdaptedLinear]):
    """A frozen model and its adapted linears by name: what adapters are bound to, one at a time."""

    def __init__(self, model: nn.Module, linears: Mapping[str, AdaptedLinear]) -> None:
        self.model = model
        self._linears = dict(linears)

    def __getitem__(self, name: str) -> AdaptedLinear:
        return self._linears[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)

    @property
    def training(self) -> bool:
        """Whether the model is in training mode, in which routing policies draw noise."""
        return self.model.training


def wrap(model: nn.Module, sites: Sequence[Site]) -> AdaptedModel:
    """Freeze `model` and wrap the linears of `sites` in place.

    Raises `AdapterError` if the model has adapters already.
    """
    check_bare(model)
    model.requires_grad_(False)
    floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    dtype = next(floating, torch.float32)
    linears = {}
    for site in sites:
        parent_name, _, child = site.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = parent.get_submodule(child)
        linear = AdaptedLinear(base, site.name, dtype=dtype).train(base.training)
        setattr(parent, child, linear)
        linears[site.name] = linear
    for name, module in list(model.named_modules()):
        for children in getattr(module, "shared_inputs", ()):
            _join_siblings(module, name, children)
    return AdaptedModel(model, linears)


def _join_siblings(parent: nn.Module, name: str, children: tuple[str, ...]) -> None:
    """Join children that read the same input, if any is adapted."""
    members = [parent.get_submodule(child) for child in children]
    if any(isinstance(member, AdaptedLinear) for member in members):
        siblings = Siblings(members, f"{name}.{'+'.join(children)}")
        setattr(parent, siblings_name(children), siblings.train(parent.training))


def check_bare(model: nn.Module) -> None:
    """Raise `AdapterError` if an adapter is attached to `model`."""
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise AdapterError("the model has adapters already; call detach(model) first")


def detach(model: nn.Module) -> None:
    """Put the bare linears back; the adapter keeps its tensors and is attached to no model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Siblings):
            parent_name, _, child = name.rpartition(".")
            delattr(model.get_submodule(parent_name), child)
        elif isinstance(module, AdaptedLinear):
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, module.base)
            module.leave()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the bare backbone inside the block; afterwards each linear is on or off as before."""
    before = [
        (module, module.is_off) for module in model.modules() if isinstance(module, AdaptedLinear)
    ]
    for module, _ in before:
        module.is_off = True
    try:
        yield
    finally:
        for module, was_off in before:
            module.is_off = was_off
