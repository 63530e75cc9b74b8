"""One pass of our Adafactor over stacked tensors, against transformers' tensor by tensor.

The tensors are those of an MHR adapter after a step with some of its tasks: inventories with dense
gradients, routing tables of which few rows have one. Shape letters: N linears, T tasks, U tasks in
the batch, G tables, Q splits, S skills.
"""

import statistics
import time
from typing import Any

import torch
from step_time_ways import N_TASKS, Setting
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.config import OptimConfig
from mhr_scale.training.optim import Adafactor, make_optimizer

CONFIG = OptimConfig(name="adafactor", lr=1e-3, routing_lr=0.1)


class Gradients:
    """Gradients of one step after another, for the stacks and for each tensor of theirs."""

    def __init__(self, adapter: Adapter, setting: Setting) -> None:
        self.adapter, self.rows = adapter, torch.tensor(setting.task_ids, device=setting.device)
        self.generator = torch.Generator(setting.device).manual_seed(2)

    def draw(self) -> dict[str, Tensor]:
        """Random gradients of the stacks (N, ...) and of the routing rows in use (U, G, Q, S)."""
        found = {}
        for name, parameter in self.adapter.named_parameters():
            shape = parameter.shape
            if name == "routing_logits":
                shape = (len(self.rows), *shape[1:])
            options = {"generator": self.generator, "device": parameter.device}
            found[name] = torch.randn(shape, **options)
        return found

    def give_stacked(self, drawn: dict[str, Tensor]) -> None:
        """As `slots.backward` leaves them: routing rows are sparse over tasks."""
        for name, parameter in self.adapter.named_parameters():
            gradient = drawn[name]
            if name == "routing_logits":
                index = self.rows.unsqueeze(0)
                gradient = torch.sparse_coo_tensor(
                    index, gradient, parameter.shape, check_invariants=False
                )
            parameter.grad = gradient

    def give_separate(self, drawn: dict[str, Tensor], parts: dict[str, list[nn.Parameter]]) -> None:
        """As autograd leaves them: a table's gradient is zero where a task is absent."""
        for name, members in parts.items():
            for number, member in enumerate(members):
                if name == "routing_logits":
                    gradient = torch.zeros_like(member)
                    gradient[self.rows] = drawn[name][:, number].flatten(1)
                else:
                    gradient = drawn[name][number]
                member.grad = gradient


def separate(adapter: Adapter) -> dict[str, list[nn.Parameter]]:
    """The same numbers as one parameter per linear and side, and per routing table."""
    parts = {}
    for name, parameter in adapter.named_parameters():
        tensors = parameter.data.unbind(0)
        if name == "routing_logits":
            tensors = tuple(table.flatten(1) for table in parameter.data.unbind(1))
        parts[name] = [nn.Parameter(tensor.clone()) for tensor in tensors]
    return parts


def largest_difference(adapter: Adapter, parts: dict[str, list[nn.Parameter]]) -> float:
    """Of any number of all tensors, relative to the largest number of its stack."""
    found = 0.0
    for name, parameter in adapter.named_parameters():
        dim = 1 if name == "routing_logits" else 0
        other = torch.stack(
            [part.data.view_as(parameter.data.select(dim, 0)) for part in parts[name]], dim
        )
        gap = (parameter.data - other).abs().max() / parameter.data.abs().max()
        found = max(found, float(gap))
    return found


class Counter(TorchDispatchMode):
    """Counts operations."""

    total = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.total += not operation.is_view
        return operation(*args, **(kwargs or {}))


def compare(model: Any, setting: Setting, *, turns: int) -> dict[str, Any]:
    """Times of a pass (CPU time; on a GPU the clock's), operations, and what differs at the end."""
    from transformers.optimization import Adafactor as Separate

    config = AdapterConfig(n_skills=8, n_splits=8, rank=1)
    names = [f"task {number}" for number in range(N_TASKS)]
    adapter = Adapter(config, find_sites(model, "full"), task_names=names).to(setting.device)
    for parameter in adapter.parameters():
        parameter.data.normal_(0.0, 0.1)
    stacked = make_optimizer(adapter, CONFIG)
    assert isinstance(stacked, Adafactor)
    parts = separate(adapter)
    fixed = {"relative_step": False, "warmup_init": False, "scale_parameter": False}
    groups = [
        {"params": members, "lr": 0.1 if name == "routing_logits" else 1e-3}
        for name, members in parts.items()
    ]
    plain = Separate(groups, **fixed)
    gradients = Gradients(adapter, setting)
    is_gpu = setting.device.type == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time
    seconds: dict[str, list[float]] = {"stacked": [], "separate": []}
    operations = {}
    for _ in range(turns + 1):
        drawn = gradients.draw()
        gradients.give_stacked(drawn)
        gradients.give_separate(drawn, parts)
        for name, optimizer in (("stacked", stacked), ("separate", plain)):
            if name not in operations:
                with Counter() as counter:
                    optimizer.step()
                operations[name] = counter.total
                continue
            begun = clock()
            optimizer.step()
            if is_gpu:
                torch.cuda.synchronize()
            seconds[name].append(clock() - begun)
    ratios = [b / a for a, b in zip(seconds["stacked"], seconds["separate"], strict=True)]
    return {
        "tensors": sum(map(len, parts.values())),
        "ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "separate_by_stacked": statistics.median(ratios),
        "operations": operations,
        "largest_difference": largest_difference(adapter, parts),
        "steps": turns + 1,
    }
