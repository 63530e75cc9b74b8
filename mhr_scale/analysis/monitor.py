"""Gradient alignment during training, always of the same tasks and rows.

Measuring draws no random numbers and leaves no gradients, so a run ends with exactly the same
adapter with and without the monitor.
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
    """Measures alignment every `alignment_every` steps, at the start and at the end."""

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
        """Values for metrics.jsonl; None unless two tasks have a gradient. Collective.

        Layers in which no pair of tasks has a direction are left out.
        """
        device = self.source.placed.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            measured = alignment.gather_alignment(self.source, self.tasks)
        if measured.mean is None:
            return None
        return {
            "alignment": measured.mean,
            "alignment_tasks": len(measured.tasks),
            "alignment_by_layer": {
                k: mean for k, mean in measured.layers.items() if mean is not None
            },
        }


def check_tasks(config: PretrainConfig, tokens: TokenSet) -> None:
    """Raise `ConfigError` if alignment is to be measured in a run of a single task."""
    if config.monitor.alignment_every and len(tokens.cards) < 2:
        raise ConfigError(
            f"monitor.alignment_every: alignment compares tasks, and the only one here is "
            f"'{tokens.cards[0].name}'; set it to 0"
        )


def make_monitor(
    config: PretrainConfig, *, placed: PlacedBackbone, adapter: Adapter, tokens: TokenSet
) -> Monitor | None:
    """The monitor that the recipe asks for; None if it asks for none."""
    settings = config.monitor
    if not settings.alignment_every:
        return None
    chosen = alignment.sample_tasks(
        len(tokens.cards), settings.alignment_tasks, seed=config.run.seed
    )
    source = alignment.GradientSource(
        placed=placed,
        adapter=adapter,
        micro_batch_size=config.batch.micro_batch_size,
        pad_multiple=config.batch.pad_multiple,
        is_flat=placed.lays_flat(config.batch.packing, "batch.packing"),
    )
    return Monitor(
        source,
        alignment.fixed_rows(tokens, chosen, rows=settings.alignment_rows),
        every=settings.alignment_every,
        last=config.schedule.steps,
    )
