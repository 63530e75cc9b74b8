"""Keeping ranks with different jobs in step over a sharded backbone.

Every pass gathers weights from all ranks, so all must run the same kind of pass at the same time: a
training pass (forward and backward), a ranking pass (forward) or a generation. Before each pass a
rank announces the kind it wants; the first kind of `KINDS` that any rank wants runs, and ranks that
want another one, or are done, run a dummy pass of it: one row of a few tokens, whose gradients are
discarded. Training comes first, so that ranks meet at their evaluations. With a replicated backbone
ranks are independent, and a turn costs nothing.
"""

from collections.abc import Callable

import torch

from mhr_scale.engine.engine import Engine
from mhr_scale.run import stopping

#: Kinds of passes, in order of precedence.
KINDS = ("train", "rank", "generate")
SAVED = "the jobs of this rank are saved"


class Lockstep:
    """Takes turns with the other ranks; `run_dummy` runs a dummy pass of a kind."""

    def __init__(self, engine: Engine, run_dummy: Callable[[str], None]) -> None:
        self.engine = engine
        self.run_dummy = run_dummy
        self._is_needed = engine.is_sharded and engine.world_size > 1

    def turn(self, kind: str) -> None:
        """Run dummy passes until one of this kind is due; the caller then runs it. Collective.

        Raises `Stopped` on all ranks that are in step if one of them was asked to stop.
        """
        if not self._is_needed and stopping.is_asked():
            raise stopping.stop(SAVED)
        while self._is_needed:
            agreed = self._agree(KINDS.index(kind))
            if KINDS[agreed] == kind:
                return
            self.run_dummy(KINDS[agreed])

    def finish(self) -> None:
        """Run dummy passes until all ranks are done. Collective."""
        while self._is_needed:
            agreed = self._agree(len(KINDS))
            if agreed == len(KINDS):
                return
            self.run_dummy(KINDS[agreed])

    def _agree(self, wanted: int) -> int:
        """The index of the first kind that any rank wants; `len(KINDS)` if all are done."""
        flags = torch.zeros(len(KINDS) + 2, device=self.engine.device)
        flags[wanted] = 1
        flags[-1] = stopping.is_asked()
        self.engine.reduce_sum(flags)
        if flags[-1]:
            raise stopping.stop(SAVED)
        return next(kind for kind, count in enumerate(flags.tolist()) if count)
