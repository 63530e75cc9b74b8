"""Blocks whose forward is one compiled graph each, the same for all blocks that are alike.

A block's class is exchanged for one with the compiled forward in front: what stands around a block
(hooks, activations computed anew) stays outside of the graph, names and weights as they are.
Whatever changes from step to step is an argument of the graph: tensors of slots, of any size, and
what only the host knows as it is (`adapters.in_graph`). Graphs differ by what Python decides while
one is made, such as the number of attention's rectangles.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mhr_scale.families.fused import fused_class

#: Graphs of one block class at most; one more is an error, not a pass that runs without.
MOST_GRAPHS = 64


class Compiled:
    """In front of a block's class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the class itself computes."""
        return self.graph(self, *args, **kwargs)


def compile_blocks(blocks: Iterable[nn.Module], *, backend: Any = "inductor") -> None:
    """Let each block run as one graph, made when it is first called; a break of it is an error."""
    for block in blocks:
        original: Any = type(block)
        kind = fused_class(Compiled, original)
        if "graph" not in vars(kind):
            kind.graph = staticmethod(
                torch.compile(
                    original.forward,
                    fullgraph=True,
                    dynamic=True,
                    backend=backend,
                    recompile_limit=MOST_GRAPHS,
                )
            )
        block.__class__ = kind
