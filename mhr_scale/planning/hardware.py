"""The machines of a plan: from settings, from a table of GPUs, or detected.

Peaks are the vendors' for dense matrix products. The share of a peak that a step reaches is assumed
to be the same for all GPUs: `PRODUCT_SHARE` for matrix products, `MEMORY_SHARE` for memory.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil

from mhr_scale.config import HardwareConfig
from mhr_scale.errors import ConfigError, did_you_mean
from mhr_scale.planning.measured import Measured, read_measured

PRODUCT_SHARE = 0.65
MEMORY_SHARE = 0.8
#: Host time of a kernel launch, seconds.
LAUNCH_SECONDS = 6e-6
#: GPU memory of a process before its first tensor, GiB: context, libraries' workspaces.
CONTEXT_GIB = 1.2
#: Host memory of a process before its first tensor, GiB: interpreter, libraries (0.4 - 0.6 seen).
PROCESS_GIB = 0.5
#: Share of a GPU's memory that the allocator loses to fragmentation.
FRAGMENTED = 0.04
#: Share of a machine's memory that a run may take; the rest is the system's.
HOST_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU of the table, with memory in GiB as the driver reports it, or a CPU; TFLOP/s, GB/s."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    host_gb_s: float


#: Links: bus bandwidth that all-gathers reach, over NVSwitch of the generation or else PCIe.
CARDS = {
    "V100-16G": Device(15.8, 15.7, 15.7, 900, 130, 12),
    "V100-32G": Device(31.7, 15.7, 15.7, 900, 130, 12),
    "RTX-3090": Device(23.6, 71, 35.6, 936, 20, 25),
    "RTX-4090": Device(23.5, 165, 82.6, 1008, 20, 25),
    "L4": Device(22.0, 121, 30.3, 300, 20, 25),
    "A100-40G": Device(39.4, 312, 19.5, 1555, 230, 25),
    "A100-80G": Device(79.2, 312, 19.5, 2039, 230, 25),
    "H100": Device(79.1, 989, 67, 3350, 360, 50),
    "H200": Device(139.8, 989, 67, 4800, 360, 50),
}
CPU = "cpu"
#: The matrix product that is measured on a CPU, tokens x inputs x outputs, as in the layers of a
#: backbone; and for how long, seconds.
LAYER = (256, 2048, 5120)
MEASURED_SECONDS = 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """The machines of a plan. Bytes, reached FLOP/s, bytes/s."""

    name: str
    ranks: int
    nodes: int
    memory: float
    host_memory: float | None
    bf16_flops: float
    fp32_flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    host_rate: float
    nvme_rate: float
    disk_rate: float
    launch_seconds: float = LAUNCH_SECONDS
    measured: str = ""
    """Which rates are measured, and where; empty: none."""

    @property
    def on_gpu(self) -> bool:
        """Whether the ranks are GPUs."""
        return self.name != CPU

    @property
    def ranks_per_node(self) -> int:
        """Ranks of one machine."""
        return self.ranks // self.nodes

    @property
    def usable(self) -> float:
        """Bytes of a rank that tensors can use."""
        if not self.on_gpu:
            return self.memory
        return (self.memory - CONTEXT_GIB * 2**30) * (1.0 - FRAGMENTED)

    @property
    def room(self) -> float | None:
        """Bytes of a machine's memory that runs can use; None: unlimited.

        On CPUs its ranks share it, and what they may take together is no more.
        """
        host = None if self.host_memory is None else HOST_SHARE * self.host_memory
        if self.on_gpu:
            return host
        together = self.ranks_per_node * self.memory
        return together if host is None else min(together, host)

    @property
    def gather_rate(self) -> float:
        """Bus bandwidth of an all-gather over all ranks, bytes/s."""
        return self.link_rate if self.nodes == 1 else min(self.link_rate, self.network_rate)

    def flops(self, dtype: str) -> float:
        """FLOP/s of matrix products that a step reaches."""
        return self.bf16_flops if dtype == "bfloat16" else self.fp32_flops


def find_machines(config: HardwareConfig) -> Machines:
    """The machines a plan is made for; raises `ConfigError` for a GPU that is not in the table."""
    name = config.gpu
    is_here = name is None
    ranks = config.gpus
    memory: float | None = None
    if name is None:
        name, count, memory = _detect()
        ranks = ranks or count * config.nodes
    ranks = ranks or config.nodes
    if ranks % config.nodes:
        raise ConfigError(
            f"hardware.nodes: {ranks} cards do not divide over {config.nodes} machines; use a "
            "number that divides them"
        )
    device = _measure_cpu(ranks // config.nodes) if name == CPU else _look_up(name)
    if name == CPU and memory is None:
        memory = psutil.virtual_memory().available / (ranks // config.nodes)
    if config.memory_gib is not None:
        memory = config.memory_gib * 2**30
    host: float | None = float(psutil.virtual_memory().total) if is_here else None
    if config.host_memory_gib is not None:
        host = config.host_memory_gib * 2**30
    product_share, memory_share = (PRODUCT_SHARE, MEMORY_SHARE) if name != CPU else (1.0, 1.0)
    peaks = {"bf16": device.bf16_tflops, "fp32": device.fp32_tflops}
    if config.tflops is not None:
        peaks = dict.fromkeys(peaks, config.tflops)
    found = Machines(
        name=name,
        ranks=ranks,
        nodes=config.nodes,
        memory=device.memory_gib * 2**30 if memory is None else memory,
        host_memory=host,
        bf16_flops=peaks["bf16"] * 1e12 * product_share,
        fp32_flops=peaks["fp32"] * 1e12 * product_share,
        memory_rate=(config.memory_gb_s or device.memory_gb_s) * 1e9 * memory_share,
        link_rate=(config.link_gb_s or device.link_gb_s) * 1e9,
        network_rate=config.network_gb_s * 1e9,
        host_rate=(config.host_gb_s or device.host_gb_s) * 1e9,
        nvme_rate=config.nvme_gb_s * 1e9,
        disk_rate=config.disk_gb_s * 1e9,
    )
    return found if config.measured is None else _with_measured(found, config.measured)


def _with_measured(machines: Machines, file: str) -> Machines:
    """The machines with the rates of a file; raises `ConfigError` if they are of another card."""
    rates = read_measured(file)
    if not _is_called(machines.name, rates.card):
        raise ConfigError(
            f"hardware.measured: {file} is of a {rates.card}, and the plan for {machines.name}; "
            "name its card in hardware.gpu, or leave it out"
        )
    return with_rates(machines, rates)


def with_rates(machines: Machines, rates: Measured) -> Machines:
    """The machines with measured rates in place of the table's."""
    return replace(
        machines,
        bf16_flops=rates.products,
        memory_rate=rates.memory,
        host_rate=rates.host,
        launch_seconds=rates.launch,
        measured=rates.what,
    )


def _is_called(name: str, device: str) -> bool:
    """Whether a driver's name of a card can be of the one that the table calls so."""
    plain = device.replace(" ", "-").upper()
    return name.rsplit("-", 1)[0] in plain or name in plain


def _look_up(name: str) -> Device:
    if name not in CARDS:
        raise ConfigError(
            f"hardware.gpu: no card '{name}' in the table{did_you_mean(name, CARDS)}; known: "
            f"{', '.join(CARDS)}, {CPU}; name a similar one and give memory_gib, tflops, "
            "memory_gb_s, link_gb_s and host_gb_s under hardware"
        )
    return CARDS[name]


def _detect() -> tuple[str, int, float | None]:
    """Name in the table, number and memory (bytes) of this machine's GPUs; or the CPU."""
    import torch

    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return CPU, 1, None
    count, gpu = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    gib = gpu.total_memory / 2**30
    fitting = [name for name in CARDS if _is_called(name, gpu.name)]
    if not fitting:
        raise ConfigError(
            f"hardware.gpu: {gpu.name} is not in the table ({', '.join(CARDS)}); name a similar "
            "one and give tflops, memory_gb_s, link_gb_s and host_gb_s under hardware"
        )
    nearest = min(fitting, key=lambda name: abs(CARDS[name].memory_gib - gib))
    return nearest, count, float(gpu.total_memory)


def _measure_cpu(processes: int) -> Device:
    """What each of `processes` on this CPU reaches, with the threads that it gets."""
    import torch

    threads = torch.get_num_threads()
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count() or 1)
    own = min(threads, max(1, cores // processes))
    share = min(1.0, cores / (own * processes))
    big = torch.ones(2**24)
    moved = 2 * big.nbytes / _best_seconds(big.clone) / 1e9 / processes
    rates = {}
    torch.set_num_threads(own)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = (torch.ones(*shape, dtype=dtype) for shape in (LAYER[:2], LAYER[1:]))
            seconds = _best_seconds(lambda x=x, weight=weight: x @ weight)  # type: ignore[misc]
            rates[dtype] = share * 2.0 * math.prod(LAYER) / seconds / 1e12
    finally:
        torch.set_num_threads(threads)
    host = psutil.virtual_memory().available / 2**30 / processes
    return Device(host, rates[torch.bfloat16], rates[torch.float32], moved, moved / 2, moved)


def _best_seconds(action: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls, after some to warm up: others may use the machine."""
    for _ in range(3):
        action()
    best, begun = math.inf, time.perf_counter()
    while (start := time.perf_counter()) - begun < MEASURED_SECONDS:
        action()
        best = min(best, time.perf_counter() - start)
    return best
