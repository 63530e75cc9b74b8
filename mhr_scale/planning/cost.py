"""Bytes of a GPU and seconds per step of each placement, from counts; and which one to use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from mhr_scale.planning.hardware import PROCESS_GIB, Machines
from mhr_scale.planning.placements import GATHERS, Load, Placement
from mhr_scale.planning.tracing import Trace, combine

#: Largest number of rows (or jobs) per pass that is considered.
MOST_ROWS = 4096
GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Counts of a pass at two numbers of rows (or jobs), linear in between and beyond."""

    few: int
    many: int
    of_few: Trace
    of_many: Trace

    def at(self, rows: int) -> Trace:
        """The counts at a number of rows."""
        share = (rows - self.few) / (self.many - self.few)
        return combine([(1.0 - share, self.of_few), (share, self.of_many)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank at its peak, by purpose, and of its machine's host memory.

    On CPUs the ranks' own memory is the machine's, and counts in `host` too.
    """

    weights: float
    gathered: float
    adapter: float
    gradients: float
    optimizer: float
    logits: float
    activations: float
    process: float
    """On CPUs: interpreter and libraries, and copies of what is being saved."""
    host: float

    @property
    def total(self) -> float:
        """Bytes of the rank."""
        of_rank = (self.weights, self.gathered, self.adapter, self.gradients, self.optimizer)
        return float(sum((*of_rank, self.logits, self.activations, self.process)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Seconds of a pass, by resource."""

    compute: float
    memory: float
    launches: float
    links: float
    network: float
    host_link: float
    nvme: float
    disk: float

    @property
    def parts(self) -> dict[str, float]:
        """The seconds, by the names used in output."""
        return {
            "compute": self.compute,
            "memory traffic": self.memory,
            "kernel launches": self.launches,
            "gathers over links": self.links,
            "gathers over the network": self.network,
            "the host's link": self.host_link,
            "NVMe": self.nvme,
            "files read again": self.disk,
        }

    @property
    def busy(self) -> float:
        """Seconds of a pass: compute, then memory traffic; everything else overlaps with both."""
        others = (self.launches, self.links, self.network, self.host_link, self.nvme, self.disk)
        return max(self.compute + self.memory, *others)

    @property
    def limit(self) -> str:
        """The resource that limits the pass."""
        if self.compute + self.memory >= self.busy:
            return "compute" if self.compute >= self.memory else "memory traffic"
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate for one placement and kind of recomputation, at a number of rows per pass."""

    placement: Placement
    recompute: str
    rows: int
    largest_rows: int
    memory: Memory
    fits: bool
    why_not: str
    seconds: Seconds
    flop: float
    kernels: float
    moved: Mapping[str, float]
    step_seconds: float
    passes: int
    tokens_per_second: float
    is_same_precision: bool
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_preferred(self) -> bool:
        """Whether it keeps the recipe's precision, and all weights on GPUs or in their files."""
        return self.is_same_precision and self.placement.is_resident

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; bytes and seconds."""
        return {
            "placement": self.placement.name,
            "settings": {**self.placement.settings, "backbone.recompute": self.recompute},
            "rows_per_pass": self.rows,
            "largest_rows_per_pass": self.largest_rows,
            "fits": self.fits,
            "why_not": self.why_not or None,
            "bytes": {**asdict(self.memory), "total": self.memory.total},
            "flop_per_step": self.flop,
            "kernels_per_step": self.kernels,
            "moved_bytes_per_step": dict(self.moved),
            "seconds_per_pass": {**asdict(self.seconds), "total": self.seconds.busy},
            "passes_per_step": self.passes,
            "seconds_per_step": self.step_seconds,
            "limit": self.seconds.limit,
            "tokens_per_second": self.tokens_per_second,
            **self.extra,
        }


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of an estimate for one placement and kind of recomputation."""

    placement: Placement
    recompute: str
    load: Load
    machines: Machines
    counts: Passes
    adapter_bytes: float
    job_bytes: float = 0.0
    trains: bool
    reduces: bool
    is_same_precision: bool

    @property
    def gathers(self) -> float:
        """How often a pass gathers each weight."""
        return GATHERS[self.recompute] if self.trains else 1.0

    @property
    def readings(self) -> float:
        """How often a pass reads each weight: in forward, recomputation and backward."""
        return (2.0 + (self.recompute != "none")) if self.trains else 1.0

    def memory(self, rows: int) -> Memory:
        """Bytes of a rank at a number of rows."""
        trace = self.counts.at(rows)
        gradients, optimizer = (trace.held.get(name, 0.0) for name in ("gradients", "optimizer"))
        peaks = dict(trace.peaks)
        if self.reduces and "update" in peaks:  # the flat buffer of the all-reduce
            peaks["update"] += gradients
        top = max(peaks, key=lambda name: peaks[name])
        logits = trace.logits[top]
        left = max(0.0, peaks[top] - logits - optimizer)
        adapter, per_node = self.adapter_bytes + rows * self.job_bytes, self.machines.ranks_per_node
        process = PROCESS_GIB * GIB + (adapter + optimizer if self.trains else 0.0)
        on_gpu = self.machines.on_gpu
        memory = Memory(
            weights=self.load.weights,
            gathered=self.load.gathered,
            adapter=adapter,
            gradients=min(gradients, left),
            optimizer=optimizer,
            logits=logits,
            activations=max(0.0, left - gradients),
            process=0.0 if on_gpu else process,
            host=self.load.host,
        )
        own = process if on_gpu else memory.total
        return replace(memory, host=self.load.host + per_node * own)

    def fits(self, rows: int) -> bool:
        """Whether that many rows fit in the memory of a rank, and of a machine."""
        memory, room = self.memory(rows), self.machines.room
        return memory.total <= self.machines.usable and (room is None or memory.host <= room)

    @cached_property
    def largest(self) -> int:
        """The largest number of rows that fits, at most `MOST_ROWS`; 0 if not even one does."""
        if not self.fits(1):
            return 0
        low, high = 1, MOST_ROWS + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low

    def why_not(self) -> str:
        """Why the placement cannot be used; empty if it can."""
        if self.largest:
            return ""
        memory, usable, room = self.memory(1), self.machines.usable, self.machines.room
        if memory.total > usable:
            return f"{memory.total / GIB:.1f} GiB for one row, {usable / GIB:.1f} GiB usable"
        assert room is not None
        return f"{memory.host / GIB:.1f} GiB of a machine's memory, {room / GIB:.1f} GiB usable"

    def seconds(self, rows: int) -> Seconds:
        """Seconds of one pass."""
        trace = self.counts.at(rows)
        machines, load = self.machines, self.load
        flops, rate = machines.flops(self.placement.dtype), machines.memory_rate
        compute = memory = 0.0
        for (flop, moved), number in trace.passes.items():
            if flop / flops >= moved / rate:
                compute += number * flop / flops
            else:
                memory += number * moved / rate
        return Seconds(
            compute=compute,
            memory=memory + self.readings * 2.0 * load.unpacked / rate,
            launches=sum(trace.passes.values()) * machines.launch_seconds,
            links=self.gathers * load.over_links / machines.link_rate,
            network=self.gathers * load.over_network / machines.gather_rate,
            host_link=self.gathers * load.from_host / machines.host_rate,
            nvme=self.gathers * load.from_nvme / machines.nvme_rate,
            disk=self.readings * self.evicted(rows) / machines.disk_rate,
        )

    def evicted(self, rows: int) -> float:
        """Bytes of mapped files that the machine's memory has no room for beside the ranks'."""
        room = self.machines.room
        if room is None:
            return 0.0
        return max(0.0, self.load.mapped - (room - self.memory(rows).host))

    def estimate(self, rows: int, *, passes: int, tokens: float) -> Estimate:
        """The estimate at `rows` per pass; `tokens` are those of a step over all ranks."""
        trace, machines = self.counts.at(rows), self.machines
        seconds, why_not = self.seconds(rows), self.why_not()
        reduced = 0.0
        if self.reduces:
            share = (machines.ranks - 1) / machines.ranks
            reduced = 2.0 * share * trace.held.get("gradients", 0.0)
        update = sum(n * moved for (_, moved), n in trace.update.items()) / machines.memory_rate
        update = max(update, sum(trace.update.values()) * machines.launch_seconds)
        step = passes * seconds.busy + update + reduced / machines.gather_rate
        moved = {
            "card_memory": passes * sum(n * moved for (_, moved), n in trace.passes.items()),
            "gathered": passes * self.gathers * (self.load.over_links + self.load.over_network),
            "host_to_card": passes * self.gathers * self.load.from_host,
            "nvme_to_host": passes * self.gathers * self.load.from_nvme,
            "files_read_again": passes * self.readings * self.evicted(rows),
            "adapter_all_reduce": reduced,
        }
        return Estimate(
            placement=self.placement,
            recompute=self.recompute,
            rows=rows,
            largest_rows=self.largest,
            memory=self.memory(rows),
            fits=not why_not and self.largest >= rows,
            why_not=why_not,
            seconds=seconds,
            flop=passes * sum(n * flop for (flop, _), n in trace.passes.items()),
            kernels=passes * sum(trace.passes.values()) + sum(trace.update.values()),
            moved=moved,
            step_seconds=step,
            passes=passes,
            tokens_per_second=tokens / step,
            is_same_precision=self.is_same_precision,
        )


def choose(estimates: Sequence[Estimate], *, by: Callable[[Estimate], float]) -> Estimate | None:
    """The placement to use, preferably one that `is_preferred`; None if nothing fits.

    `by` is the time to minimise. Among times within 2 %, replicated placements (whose ranks need
    no lock-step), mapped weights and no recomputation win.
    """
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        return None
    candidates = [estimate for estimate in fitting if estimate.is_preferred] or fitting
    best = min(by(estimate) for estimate in candidates)
    near = [estimate for estimate in candidates if by(estimate) <= 1.02 * best]

    def rank(one: Estimate) -> tuple[bool, bool, bool, float]:
        placement = one.placement
        is_copied = placement.is_mapped is False
        return placement.is_sharded, is_copied, one.recompute != "none", by(one)

    return min(near, key=rank)
