"""Gradient alignment while an adapter trains: the same tasks and rows every time.

Measuring draws no random number and leaves no gradient, so a run with the monitor ends with the
very adapter it has without.
"""

from typing import Any

import torch

from mhr_scale.adapters import Adapter
from mhr_scale.analysis import alignment
from mhr_scale.config import PretrainConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import ConfigError
from mhr_scale.rows.tokens import TokenSet


class Monitor:
    """Measures at every `alignment_every`-th step, the start and the end among them."""

    def __init__(
        self,
        source: alignment.GradientSource,
        tasks: list[alignment.AlignedTask],
        *,
        every: int,
        last: int,
    ) -> None:
        self.source, self.tasks = source, tasks
        self._every, self._last = every, last

    def is_due(self, step: int) -> bool:
        """Whether this step is measured."""
        return step % self._every == 0 or step == self._last

    def gather_values(self) -> dict[str, Any] | None:
        """The step's figures for metrics.jsonl; None if no two tasks have a gradient. Collective.

        Layers in which no pair of tasks has a direction are left out.
        """
        device = self.source.placed.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = alignment.gather_alignment(self.source, self.tasks)
        if found.mean is None:
            return None
        return {
            "alignment": found.mean,
            "alignment_tasks": len(found.tasks),
            "alignment_by_layer": {k: mean for k, mean in found.layers.items() if mean is not None},
        }


def check_tasks(config: PretrainConfig, tokens: TokenSet) -> None:
    """Raise `ConfigError` if a run is to be watched that has one task only."""
    if config.monitor.alignment_every and len(tokens.cards) < 2:
        raise ConfigError(
            f"monitor.alignment_every: alignment compares tasks, and the only one here is "
            f"'{tokens.cards[0].name}'; set it to 0"
        )


def make_monitor(
    config: PretrainConfig, *, placed: PlacedBackbone, adapter: Adapter, tokens: TokenSet
) -> Monitor | None:
    """The monitor that a recipe asks for, if it does."""
    asked = config.monitor
    if not asked.alignment_every:
        return None
    chosen = alignment.sample_tasks(len(tokens.cards), asked.alignment_tasks, seed=config.run.seed)
    source = alignment.GradientSource(
        placed=placed,
        adapter=adapter,
        micro_batch_size=config.batch.micro_batch_size,
        pad_multiple=config.batch.pad_multiple,
    )
    return Monitor(
        source,
        alignment.fixed_rows(tokens, chosen, rows=asked.alignment_rows),
        every=asked.alignment_every,
        last=config.schedule.steps,
    )
