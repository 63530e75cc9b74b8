"""Settings of `analyse`, and of the measurements during pre-training."""

from dataclasses import field
from typing import Literal

from mhr_scale.config.training import Cut, PlainRunConfig
from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part, recipe
from mhr_scale.tasks.suites import TasksConfig


def _check_sample(part_name: str, prefix: str, *, tasks: int | None, rows: int) -> None:
    """Raise `ConfigError` for fewer than two tasks or no row."""
    if tasks is not None and tasks < 2:
        raise ConfigError(f"{part_name}.{prefix}tasks: {tasks} make no pair; use 2 or more")
    if rows < 1:
        raise ConfigError(f"{part_name}.{prefix}rows: {rows} is not at least 1")


@part
class MonitorConfig:
    """What is measured during training, without changing what the adapter learns."""

    alignment_every: int = 0
    """Steps between measurements of gradient alignment, and one at the start and at the end; 0:
    never. Each takes 8 bytes per trained number on top of a step."""
    alignment_tasks: int | None = 8
    """Tasks compared, sampled once from the run's seed; null: all."""
    alignment_rows: int = 8
    """Rows per task, the first held-out ones."""

    def __post_init__(self) -> None:
        if self.alignment_every < 0:
            raise ConfigError(f"monitor.alignment_every: {self.alignment_every} is below 0")
        _check_sample("monitor", "alignment_", tasks=self.alignment_tasks, rows=self.alignment_rows)


@part
class AlignmentConfig:
    """How gradient alignment is measured."""

    tasks: int | None = 16
    """Tasks compared, sampled from the seed; null: all. Rank 0's host keeps a gradient of each."""
    rows: int = 16
    """Rows per task: its first held-out ones, or training rows where it has none."""
    micro_batch_size: int = 4
    """Rows per rank and pass."""
    max_input_tokens: int | None = None
    """Inputs are cut here; null: as in the run the tasks come from, else 256."""
    max_target_tokens: int | None = None
    """Targets are cut here; null: as in the run the tasks come from, else 256."""
    cut: Cut | None = None
    """Where over-long inputs lose tokens; null: as in the run the tasks come from."""
    seed: int = 42
    """Seed of the sample of tasks."""
    token_cache: str | None = None
    """Folder that keeps tokenised tasks; null: that of the run, if it has one and the tasks are
    its own, else tokenise once a machine."""

    def __post_init__(self) -> None:
        _check_sample("alignment", "", tasks=self.tasks, rows=self.rows)
        for name in ("micro_batch_size", "max_input_tokens", "max_target_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"alignment.{name}: {value} is not at least 1")


@recipe
class AnalyseConfig:
    """Everything `analyse` reads; the model part comes from the adapter."""

    adapter: str
    """The run or adapter to look at, a folder or `owner/name@revision:folder` of the hub."""
    tasks: TasksConfig | None = None
    """Tasks whose gradients are compared; null: those of the run, if `adapter` is one."""
    alignment: AlignmentConfig | None = field(default_factory=AlignmentConfig)
    """Gradient alignment; null: statistics of routing and inventory alone, without a backbone."""
    backbone_moved_to: str | None = None
    """Where the adapter's backbone is now, if it has moved since training."""
    backbone_dtype: Literal["bfloat16", "float32"] | None = None
    """Data type of the backbone, if not the one the adapter was trained with."""
    backbone_quantise: Literal["none", "int8", "nf4"] | None = None
    """Frozen linears in 8 or 4 bits or neither, if not as the adapter was trained."""
    clusters: int | None = None
    """Clusters of tasks, by the weights of private LoRAs, else by the routing; null: none."""
    run: PlainRunConfig
    """Where to write."""

    def __post_init__(self) -> None:
        if self.tasks is not None and self.alignment is None:
            raise ConfigError("tasks: only alignment reads them, and alignment is null")
