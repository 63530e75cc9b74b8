"""Starting from another adapter: its skills, and the rows of the tasks that both know.

Shape letters: T tasks, Q splits, S skills.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.artefact import digest, load_tensors, named_tensors
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.sites import Site
from mhr_scale.errors import AdapterError, some

#: Settings that have to be those of the adapter: what its tensors are, and what they compute.
OF_TENSORS = ("kind", "layout", "blocks", "rank", "alpha", "n_skills", "n_splits", "private")
#: These too where both are routed: what a row of the routing tensor is.
OF_ROUTING = ("granularity", "block_span")
#: How many names of tasks are listed at most.
SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The adapter that a run starts from, and what errors and the provenance call it."""

    adapter: Adapter
    place: str
    step: int = 0

    @property
    def facts(self) -> dict[str, str | int]:
        """Which adapter it was, by its content too."""
        return {"adapter": self.place, "step": self.step, "content": digest(self.adapter)}


def check_start(
    start: Start, config: AdapterConfig, sites: Sequence[Site], task_names: Sequence[str]
) -> None:
    """Raise `AdapterError` if an adapter of these settings and tasks cannot start from another."""
    source = start.adapter
    names = [*OF_TENSORS, *(OF_ROUTING if config.has_logits and source.config.has_logits else ())]
    faults = [
        f"adapter.{name} is {getattr(source.config, name)} there, {getattr(config, name)} here"
        for name in names
        if getattr(source.config, name) != getattr(config, name)
    ]
    if faults:
        raise AdapterError(
            f"{start.place}: cannot be started from: {'; '.join(faults)}; give the recipe the "
            "adapter's settings"
        )
    if source.sites != tuple(sites):
        raise AdapterError(
            f"{start.place}: made for another backbone: {len(source.sites)} linears there, "
            f"{len(sites)} here, or of other widths; name the adapter's backbone"
        )
    if config.private and not set(task_names) & set(source.task_names):
        raise AdapterError(
            f"{start.place}: its inventories are private to tasks, and none of them is among the "
            f"recipe's ({some(task_names, shown=SHOWN)})"
        )


def load_start(adapter: Adapter, start: Start) -> str:
    """Copy into a fresh adapter what it shares with the one to start from; returns what was new.

    Tensors with a row per task are copied row by row, by the names of the tasks.
    """
    source, given = start.adapter, named_tensors(start.adapter)
    tensors: dict[str, Tensor] = {}
    numbers = {name: number for number, name in enumerate(source.task_names)}
    for name, fresh in named_tensors(adapter).items():
        if not name.endswith(".routing_logits") and not adapter.config.private:
            tensors[name] = given[name]
            continue
        tensors[name] = fresh.clone()
        for row, task in enumerate(adapter.task_names):
            if task in numbers and name in given:
                tensors[name][row] = given[name][numbers[task]]
    load_tensors(adapter, tensors, place=start.place)
    return _describe(adapter, source)


def _describe(adapter: Adapter, source: Adapter) -> str:
    if not adapter.config.has_logits and not adapter.config.private:
        return "no tensor has a row per task"
    if adapter.config.has_logits and not source.config.has_logits and not adapter.config.private:
        return f"the routing rows of all {len(adapter.task_names)} tasks are new"
    new = [name for name in adapter.task_names if name not in source.task_names]
    left = [name for name in source.task_names if name not in adapter.task_names]
    text = f"rows of {len(adapter.task_names) - len(new)} of {len(adapter.task_names)} tasks"
    text += f", new are {some(new, shown=SHOWN)}" if new else ""
    return text + (f"; left out are those of {some(left, shown=SHOWN)}" if left else "")
