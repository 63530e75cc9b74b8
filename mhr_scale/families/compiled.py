"""Blocks whose forward is one compiled graph each, the same for all blocks that are alike.

A block's class is exchanged for one with the compiled forward in front: what stands around a block
(hooks, activations computed anew) stays outside of the graph, names and weights as they are.
Whatever changes from step to step is an argument of the graph: tensors of slots, of any size, and
what only the host knows as it is (`adapters.in_graph`). Graphs differ by what Python decides while
one is made, such as the number of attention's rectangles.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config

from mhr_scale.families.flat import Flat, in_use, using
from mhr_scale.families.fused import fused_class

#: Graphs of one block class at most; one more is an error, not a pass that runs without.
MOST_GRAPHS = 64
#: What makes programs of graphs; tests exchange it for one that runs them as they are.
BACKEND = "inductor"


class Compiled:
    """In front of a block's class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the class itself computes; over a cache, which grows with every token, without."""
        if any(hasattr(argument, "get_seq_length") for argument in (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _sizes_apart():
            return self.graph(in_use(), self, *args, **kwargs)


@contextmanager
def _sizes_apart() -> Iterator[None]:
    """Inside, sizes that happen to be equal are not taken for one when a graph is made."""
    before = _config.use_duck_shape
    _config.use_duck_shape = False
    try:
        yield
    finally:
        _config.use_duck_shape = before


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let each block run as one graph, made when it is first called; a break of it is an error."""
    for block in blocks:
        original: Any = type(block)
        kind = fused_class(Compiled, original)
        kind.graph = staticmethod(_compiled(original, BACKEND))
        block.__class__ = kind


@cache
def _compiled(kind: Any, backend: Any) -> Any:
    """The forward of a class of blocks as a function of the sequences in use, block and arguments.

    Numbers that Python finds in an argument are sizes; in a global they would be constants.
    """

    def run(flat: Flat | None, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with using(flat):
            return kind.forward(block, *args, **kwargs)

    compiler: Any = torch.compile
    return compiler(run, fullgraph=True, dynamic=True, backend=backend, recompile_limit=MOST_GRAPHS)
