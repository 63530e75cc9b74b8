"""The machines: a table of cards, what is given, and what is found here.

Peaks are the makers' for dense products; what of them a step reaches is an assumption, the same
for all cards: `PRODUCT_SHARE` of the matrix products' peak, `MEMORY_SHARE` of the memory's.
"""

import os
import time
from dataclasses import dataclass

import psutil
import torch

from mhr_scale.config import HardwareConfig
from mhr_scale.errors import ConfigError, did_you_mean

PRODUCT_SHARE = 0.65
MEMORY_SHARE = 0.8
#: What starting a kernel costs the host, seconds.
LAUNCH_SECONDS = 6e-6
#: What a process takes of a card before its first tensor, GiB: context, libraries' workspaces.
CONTEXT_GIB = 1.2
#: Share of a card's memory that the allocator loses between blocks.
FRAGMENTED = 0.04


@dataclass(frozen=True, slots=True)
class Device:
    """A card of the table, memory in GiB as the driver gives it, or a CPU; TFLOP/s, GB/s."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    host_gb_s: float


#: Links are the bus bandwidth that all-gathers reach: NVSwitch of its generation, else PCIe.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """What a plan is made for. Bytes, FLOP/s as reached, bytes/s."""

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

    @property
    def on_gpu(self) -> bool:
        """Whether the ranks are cards."""
        return self.name != CPU

    @property
    def ranks_per_node(self) -> int:
        """Ranks of one machine."""
        return self.ranks // self.nodes

    @property
    def usable(self) -> float:
        """Bytes of a rank that tensors can have."""
        if not self.on_gpu:
            return self.memory
        return (self.memory - CONTEXT_GIB * 2**30) * (1.0 - FRAGMENTED)

    @property
    def gather_rate(self) -> float:
        """Bus bandwidth of an all-gather over all ranks, bytes/s."""
        return self.link_rate if self.nodes == 1 else min(self.link_rate, self.network_rate)

    def flops(self, dtype: str) -> float:
        """Matrix products a second that a step reaches, FLOP/s."""
        return self.bf16_flops if dtype == "bfloat16" else self.fp32_flops


def find_machines(config: HardwareConfig) -> Machines:
    """The machines a plan is made for; raises `ConfigError` for a card that nobody knows."""
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
    card = _measure_cpu(ranks // config.nodes) if name == CPU else _card(name)
    if name == CPU and memory is None:
        memory = psutil.virtual_memory().available / (ranks // config.nodes)
    if config.memory_gib is not None:
        memory = config.memory_gib * 2**30
    host: float | None = float(psutil.virtual_memory().total) if is_here else None
    if config.host_memory_gib is not None:
        host = config.host_memory_gib * 2**30
    product, moved = (PRODUCT_SHARE, MEMORY_SHARE) if name != CPU else (1.0, 1.0)
    peaks = {"bf16": card.bf16_tflops, "fp32": card.fp32_tflops}
    if config.tflops is not None:
        peaks = dict.fromkeys(peaks, config.tflops)
    return Machines(
        name=name,
        ranks=ranks,
        nodes=config.nodes,
        memory=card.memory_gib * 2**30 if memory is None else memory,
        host_memory=host,
        bf16_flops=peaks["bf16"] * 1e12 * product,
        fp32_flops=peaks["fp32"] * 1e12 * product,
        memory_rate=(config.memory_gb_s or card.memory_gb_s) * 1e9 * moved,
        link_rate=(config.link_gb_s or card.link_gb_s) * 1e9,
        network_rate=config.network_gb_s * 1e9,
        host_rate=(config.host_gb_s or card.host_gb_s) * 1e9,
        nvme_rate=config.nvme_gb_s * 1e9,
    )


def _card(name: str) -> Device:
    if name not in CARDS:
        raise ConfigError(
            f"hardware.gpu: no card '{name}' in the table{did_you_mean(name, CARDS)}; known: "
            f"{', '.join(CARDS)}, {CPU}; name a similar one and give memory_gib, tflops, "
            "memory_gb_s, link_gb_s and host_gb_s under hardware"
        )
    return CARDS[name]


def _detect() -> tuple[str, int, float | None]:
    """The table's name of this machine's cards, their number and memory in bytes; or the CPU."""
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return CPU, 1, None
    count, found = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    plain = found.name.replace(" ", "-").upper()
    gib = found.total_memory / 2**30
    fitting = [name for name in CARDS if name.rsplit("-", 1)[0] in plain or name in plain]
    if not fitting:
        raise ConfigError(
            f"hardware.gpu: {found.name} is not in the table ({', '.join(CARDS)}); name a similar "
            "one and give tflops, memory_gb_s, link_gb_s and host_gb_s under hardware"
        )
    nearest = min(fitting, key=lambda name: abs(CARDS[name].memory_gib - gib))
    return nearest, count, float(found.total_memory)


def _measure_cpu(processes: int) -> Device:
    """What one of so many processes of this machine reaches, from a fraction of a second."""
    a, big = torch.ones(512, 512), torch.ones(2**22)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = a.to(dtype)
        x @ x
        begun, n = time.perf_counter(), 0
        while time.perf_counter() - begun < 0.05:
            x @ x
            n += 1
        rates[dtype] = 2.0 * 512**3 * n / (time.perf_counter() - begun) / 1e12 / processes
    begun = time.perf_counter()
    for _ in range(5):
        big.clone()
    moved = 5 * 2 * big.numel() * 4 / (time.perf_counter() - begun) / 1e9 / processes
    host = psutil.virtual_memory().available / 2**30 / processes
    return Device(host, rates[torch.bfloat16], rates[torch.float32], moved, moved / 2, moved)
