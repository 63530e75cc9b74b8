"""Ways of one step that take turns: times, memory, and the share of the card that they reach."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from board import Found, Scale
from part_card import synchronize
from step_time_counts import Live
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

GIB = 2**30


class Way(Protocol):
    """What takes turns."""

    name: str
    model: nn.Module

    def step(self) -> None:
        """Once."""


@dataclass(slots=True)
class Timed:
    """One way: seconds of a step in each turn, and bytes at its peak, weights included and apart.

    `error` tells why there are none.
    """

    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0
    above: float = 0.0
    error: str = ""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    def over(self, base: "Timed") -> float | None:
        """Median over the turns of the ratio within a turn; None where either failed."""
        if self.error or base.error:
            return None
        return statistics.median(a / b for a, b in zip(self.seconds, base.seconds, strict=True))


def take_turns(ways: Sequence[Way], scale: Scale, *, turns: int = 4) -> dict[str, Timed]:
    """Steps of all ways in turns, in an order that is reversed every other time.

    Two steps of each come first: one loads its kernels, one is watched for memory. A turn is
    a step between two waits for the device. What fails, for want of memory above all, leaves the
    turns.
    """
    found = {way.name: Timed() for way in ways}
    alive = {way.name: way for way in ways}

    def watch(way: Way, timed: Timed) -> None:
        timed.peak, timed.above = measure_peak(way, scale)

    def time_once(way: Way, timed: Timed) -> None:
        timed.seconds.append(seconds_of(way.step, scale))

    if scale.is_tiny:
        turns = 1
    for name in list(alive):
        _try(watch, alive, found, name, scale)
    with no_collections():
        for turn in range(turns):
            for name in list(alive)[:: -1 if turn % 2 else 1]:
                _try(time_once, alive, found, name, scale)
    return found


def _try(
    action: Callable[[Any, Timed], None],
    alive: dict[str, Way],
    found: dict[str, Timed],
    name: str,
    scale: Scale,
) -> None:
    """Do something with a way that is dropped, with the memory of its step, if it fails."""
    try:
        action(alive[name], found[name])
    except Exception:
        found[name].error = traceback.format_exc(limit=-8)
        alive.pop(name).model.zero_grad(set_to_none=True)
    if found[name].error and scale.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def seconds_of(step: Callable[[], object], scale: Scale) -> float:
    """Seconds of a call, from an idle device to an idle device."""
    synchronize(scale)
    begun = time.perf_counter()
    step()
    synchronize(scale)
    return time.perf_counter() - begun


@contextmanager
def no_collections() -> Iterator[None]:
    """Python's collector, which walks all modules, does not run inside the block."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def measure_peak(way: Way, scale: Scale) -> tuple[float, float]:
    """Bytes of a step at its peak, with the way's own tensors and without; its kernels are loaded.

    What other ways hold is in neither. On a GPU the allocator is asked; elsewhere what a kernel
    needs within itself is not seen.
    """
    own = [*way.model.parameters(), *way.model.buffers()]
    held = float(sum(one.untyped_storage().nbytes() for one in distinct(own)))
    if not scale.on_gpu:
        with Live(own) as live:
            way.step()
        return held + live.peak, float(live.peak)
    way.step()
    synchronize(scale)
    before = torch.cuda.memory_allocated(scale.device)
    torch.cuda.reset_peak_memory_stats(scale.device)
    way.step()
    synchronize(scale)
    above = float(torch.cuda.max_memory_allocated(scale.device) - before)
    return held + above, above


def distinct(tensors: Iterable[Any]) -> list[Any]:
    """Tensors, those of one storage once."""
    return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())


def flops_of(way: Way) -> float:
    """FLOP of a step that torch counts on the device itself."""
    with FlopCounterMode(display=False) as counter:
        way.step()
    return float(counter.get_total_flops())


def found_of(
    found: dict[str, Timed],
    *,
    bases: Sequence[str],
    flops: float,
    tokens: int,
    rate: float,
) -> dict[str, Found | str]:
    """An entry for each way: time, memory, ratios to the bases, and the share of the card's rate.

    The share is that of `flops`, a step's own without adapter and recomputation; `rate` is FLOP/s.
    """
    entries: dict[str, Found | str] = {}
    for name, timed in found.items():
        if timed.error:
            entries[name] = timed.error
            continue
        values: dict[str, Any] = {
            "ms": 1e3 * timed.median,
            "tokens_per_s": tokens / timed.median,
            "share_of_rate": flops / timed.median / rate,
            "gib": timed.peak / GIB,
            "gib_above_weights": timed.above / GIB,
        }
        for base in bases:
            values[f"x {base}"] = timed.over(found[base]) if base != name else 1.0
        entries[name] = Found(values)
    return entries


def with_goal(
    entries: dict[str, Found | str], name: str, limits: dict[str, tuple[str, float]], scale: Scale
) -> None:
    """Hold an entry's values against limits, ("<=" or ">=", number) by value, too.

    At toy size they are said, and not held.
    """
    entry = entries.get(name)
    if not isinstance(entry, Found):
        return
    holds = [] if entry.holds is None else [entry.holds]
    for value, (sign, limit) in ({} if scale.is_tiny else limits).items():
        own = entry.values.get(value)
        assert not isinstance(own, str)
        holds.append(own is not None and (own <= limit if sign == "<=" else own >= limit))
    goals = [f"{value} {sign} {limit:g}" for value, (sign, limit) in limits.items()]
    goal = ", ".join([entry.goal, *goals] if entry.goal else goals)
    entries[name] = Found(entry.values, all(holds) if holds else None, goal)
