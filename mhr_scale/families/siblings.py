"""Linears of one module that read the same input, called together.

A module says which of its children do (`shared_inputs = (("q", "k", "v"),)`) and calls them through
`call_together`, or calls them one by one and is a `SharesInputs`. Where adapters are attached they
stand in the module a second time, as one.
"""

from typing import Any

from torch import Tensor, nn


def call_together(parent: nn.Module, names: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of the named children of `parent`, which read the same x."""
    siblings = parent._modules.get(siblings_name(names))
    if siblings is not None:
        return siblings(x)
    return tuple(parent._modules[name](x) for name in names)  # type: ignore[misc]


def siblings_name(names: tuple[str, ...]) -> str:
    """Name under which siblings stand in their parent."""
    return "siblings_" + "_".join(names)


class SharesInputs:
    """In front of a class whose forward calls siblings one by one: they run when the first is.

    For the time of a call attributes stand in front of the children. They hand out what siblings
    made of an input, once each; another input is another call.
    """

    shared_inputs: tuple[tuple[str, ...], ...]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the class itself computes."""
        own = vars(self)
        shown: list[str] = []
        for names in self.shared_inputs:
            if siblings_name(names) in self._modules:
                outputs: dict[str, Tensor] = {}
                own.update({name: _Handed(self, names, name, outputs) for name in names})
                shown += names
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name in shown:
                del own[name]


class _Handed:
    """Stands for a linear: its output where siblings have made it, else they run now."""

    def __init__(
        self, parent: nn.Module, names: tuple[str, ...], name: str, made: dict[str, Tensor]
    ) -> None:
        self._parent, self._names, self._name, self._made = parent, names, name, made

    def __call__(self, x: Tensor) -> Tensor:
        made = self._made
        if self._name not in made or made["input"] is not x:
            made.clear()
            made.update(zip(self._names, call_together(self._parent, self._names, x), strict=True))
            made["input"] = x
        return made.pop(self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parent._modules[self._name], name)
