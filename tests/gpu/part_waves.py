"""Few-shot jobs in waves over T5-large and T5-XL with short inputs: where waves pay."""

import statistics
from collections.abc import Sequence
from typing import Any

from board import Board, Found, Scale
from card_models import MHR_8, T5_LARGE, T5_XL, Backbones
from few_shot_peft import PeftLoop
from few_shot_ways import Bench, Setting, Waves
from few_shot_ways import Way as JobsWay
from paired import GIB, Timed, take_turns, with_goal
from step_time_ways import same_weights
from torch import nn

BACKBONES = {"T5-large": T5_LARGE, "T5-XL": T5_XL}
#: Rows of a job's step, and tokens of their inputs.
BATCHES = ((8, 16), (8, 32), (8, 128))
ALONE, PEFT = "one by one", "PEFT LoRA"
#: How far the loss of the first job's first step may differ between the ways, in bfloat16.
LOSS_WITHIN = 0.02


class Jobs:
    """Some jobs that train together, opened once: a way of `paired`, whose step is one of each."""

    def __init__(self, way: JobsWay, model: nn.Module) -> None:
        self.name, self.way = way.name, way
        self.handle = way.open(range(way.size))
        own = getattr(self.handle, "adapter", None)
        self.model = nn.ModuleList([model] if own is None else [model, own])
        self.first_loss = 0.0

    def step(self) -> None:
        """One step of each."""
        if isinstance(self.way, Waves):  # another wave may have been bound meanwhile
            self.handle.adapter.bind(self.way.placed.adapted)
        losses = self.way.step(self.handle)
        self.first_loss = self.first_loss or losses[0]


def sizes(scale: Scale) -> tuple[int, ...]:
    """Jobs of a wave."""
    return (1, 2) if scale.is_tiny else (1, 8, 32)


def ways(scale: Scale) -> list[str]:
    """Names of what is compared."""
    waves = [f"waves of {size}" if size > 1 else ALONE for size in sizes(scale)]
    return [*waves, PEFT]


def measure(board: Board, scale: Scale) -> None:
    """Every backbone and batch."""
    batches = BATCHES[:1] if scale.is_tiny else BATCHES
    for title, name in list(BACKBONES.items())[: 1 if scale.is_tiny else None]:
        titles = [f"{title}, {rows} x {tokens}" for rows, tokens in batches]
        if all(board.is_done(f"{one}, {way}") for one in titles for way in ways(scale)):
            continue
        hall = Hall(Backbones(name, scale))
        for one, (rows, tokens) in zip(titles, batches, strict=True):
            board.run_together(
                [f"{one}, {way}" for way in ways(scale)],
                lambda h=hall, t=one, r=rows, n=tokens: h.compare(t, r, n),
            )


class Hall:
    """A backbone for our jobs, the same weights for PEFT's, and the adapter all start from."""

    def __init__(self, backbones: Backbones) -> None:
        self.backbones, self.scale = backbones, backbones.scale
        self.sites = backbones.sites(MHR_8)
        self.placed = backbones.place(MHR_8)
        bench = self.bench(rows=1, tokens=8)
        self.start = bench.start(0)

    def bench(self, *, rows: int, tokens: int) -> Bench:
        """Jobs of so many rows and tokens: MHR's whole inventory under AdamW."""
        words = self.backbones.stock.config.vocab_size
        setting = Setting(rows=rows, tokens=tokens, vocabulary=words, dtype="bfloat16")
        return Bench(setting, "full", "adamw", self.sites)

    def compare(self, title: str, rows: int, tokens: int) -> dict[str, Found | str]:
        """Waves and PEFT's plain loop in turns."""
        bench = self.bench(rows=rows, tokens=tokens)
        bench.start = lambda number: self.start
        made = [
            Jobs(Waves(bench, self.placed, size=size), self.placed.model)
            for size in sizes(self.scale)
        ]
        stock = same_weights(self.backbones.stock)
        peft = PeftLoop(bench, stock, method="lora", device=self.scale.device)
        made.append(Jobs(peft, stock))
        found = take_turns(made, self.scale)
        entries = {way.name: entry_of(found[way.name], way, found[ALONE], made) for way in made}
        goals = {f"x {ALONE}": ("<=", 1.0)}
        with_goal(entries, f"waves of {sizes(self.scale)[-1]}", goals, self.scale)
        return {f"{title}, {name}": entry for name, entry in entries.items()}


def entry_of(timed: Timed, way: Jobs, alone: Timed, made: Sequence[Jobs]) -> Found | str:
    """Milliseconds per job-step, and the ratio to one by one within a turn."""
    if timed.error:
        return timed.error
    size, first = way.way.size, made[0].first_loss
    values: dict[str, Any] = {
        "ms": 1e3 * timed.median / size,
        "gib": timed.peak / GIB,
        "first_loss": way.first_loss,
    }
    if not alone.error:
        pairs = zip(timed.seconds, alone.seconds, strict=True)
        values[f"x {ALONE}"] = statistics.median(mine / size / base for mine, base in pairs)
    holds = abs(way.first_loss / first - 1.0) <= LOSS_WITHIN if first else None
    return Found(values, holds, f"the first loss of {ALONE} within {LOSS_WITHIN:.0%}")
