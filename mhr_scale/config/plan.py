"""Settings of `plan` besides the recipe: the hardware, and the size of the rows."""

from dataclasses import field

from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part


@part
class HardwareConfig:
    """The machines; what is not given is detected here, or comes from the table of GPUs."""

    gpu: str | None = None
    """A GPU of the table (A100-80G, H200, ...) or `cpu`; null: what this machine has."""
    gpus: int | None = None
    """GPUs over all nodes, or processes of `cpu`; null: what this machine has."""
    nodes: int = 1
    """Machines that share the GPUs evenly."""
    measured: str | None = None
    """An accept.json of `tests/gpu/accept.py`: rates measured on a card of this name, in place of
    shares of its maker's peaks."""
    memory_gib: float | None = None
    """Memory of a GPU, GiB."""
    host_memory_gib: float | None = None
    """Memory of a machine, GiB; null: detected, or unlimited where `gpu` is given."""
    tflops: float | None = None
    """A GPU's peak for matrix products in the backbone's data type, TFLOP/s."""
    memory_gb_s: float | None = None
    """Bandwidth of a GPU's memory, GB/s."""
    link_gb_s: float | None = None
    """Bus bandwidth of an all-gather inside a machine, GB/s."""
    network_gb_s: float = 11.0
    """Bus bandwidth of an all-gather between machines, GB/s (100 Gb/s Ethernet)."""
    host_gb_s: float | None = None
    """From pinned host memory to a GPU, GB/s."""
    nvme_gb_s: float = 5.0
    """From a machine's NVMe drives to its memory, GB/s."""
    disk_gb_s: float = 1.0
    """From the disk with the backbone's files to memory, GB/s: mapped weights, on a CPU."""

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"hardware.{name}: {value} is not at least 1")
        for name in HardwareConfig.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and value <= 0.0:
                raise ConfigError(f"hardware.{name}: {value} is not above 0")
        for name in ("tflops", "memory_gb_s", "host_gb_s"):
            if self.measured is not None and getattr(self, name) is not None:
                raise ConfigError(
                    f"hardware.{name}: {getattr(self, name)}, and hardware.measured says another; "
                    "leave one of them out"
                )
        if self.gpus is not None and self.gpus % self.nodes:
            raise ConfigError(
                f"hardware.nodes: {self.gpus} cards do not divide over {self.nodes} machines; "
                "use a number that divides them"
            )


@part
class WorkloadConfig:
    """The rows, which `plan` does not read; what is not given is the recipe's upper bound."""

    input_tokens: int | None = None
    """Tokens of an input; null: the recipe's `max_input_tokens`."""
    target_tokens: int | None = None
    """Tokens of a target; null: the recipe's `max_target_tokens`."""
    mean_input_tokens: float | None = None
    """Tokens of an input on average, as `data` prints them, for the time of packed rows; null:
    those in the recipe's `run.token_cache`, or as many as of the longest."""
    mean_target_tokens: float | None = None
    """Tokens of a target on average."""
    choices: int = 4
    """Answer choices of a row, where choices are ranked."""
    choice_tokens: int = 8
    """Tokens of a choice."""
    tasks: int | None = None
    """Training tasks, rows of the routing table; null: as many as the recipe names."""
    tasks_per_pass: int | None = None
    """Different tasks in one micro batch; null: one per row."""
    source: str | None = None
    """The pre-training recipe of adapters that do not exist yet: their backbone and settings."""

    def __post_init__(self) -> None:
        counts = ("choices", "choice_tokens", "tasks", "tasks_per_pass")
        lengths = ("input_tokens", "target_tokens", "mean_input_tokens", "mean_target_tokens")
        for name in (*lengths, *counts):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"workload.{name}: {value} is not at least 1")


@part
class PlanConfig:
    """What `plan` reads from the command line besides the recipe and its overrides."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """The machines."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    """The rows."""
