"""Collapsing an inventory into one ordinary adapter: its mean, or its mix for one task."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mhr_scale.adapters import routing
from mhr_scale.adapters.inventory import Stack
from mhr_scale.adapters.library import check_fixed
from mhr_scale.adapters.methods import Adapter
from mhr_scale.errors import AdapterError


def average(adapter: Adapter) -> Adapter:
    """Return the averaged adapter: the mean of A and of B over the skills, routing ignored.

    The result is one ordinary LoRA (or (IA)3 vector) of the same rank (docs/method.md 3, 6).
    Of private inventories it is the mean over the tasks too.
    """
    check_fixed(adapter)
    if adapter.config.private:
        adapter = _mean_over_tasks(adapter, range(len(adapter.task_names)))
    config = adapter.config
    shape = (1, len(adapter.groups), config.n_splits, config.n_skills)
    return _collapse(adapter, torch.full(shape, 1.0 / config.n_skills), name="average")


def soup(adapter: Adapter, tasks: Sequence[str], *, name: str = "soup") -> Adapter:
    """Return the mean of some tasks' private LoRAs, A and B averaged separately (AdapterSoup).

    Raises `AdapterError` if a task is unknown or pairs are not private to tasks.
    """
    check_fixed(adapter)
    if not adapter.config.private or adapter.config.is_routed:
        raise AdapterError(
            f"a soup is made of private adapters (adapter.private, one skill); this is "
            f"{adapter.config.method} with {adapter.config.n_skills} skill(s)"
        )
    mean = _mean_over_tasks(adapter, adapter.check_task_ids(list(tasks)))
    return _collapse(mean, torch.ones(1, len(adapter.groups), 1, 1), name=name)


def collapse(adapter: Adapter, task: str) -> Adapter:
    """Return one training task's adapter as an ordinary LoRA or (IA)3 vector.

    Raises `AdapterError` if the task is unknown or the adapter has no per-task routing to fix.
    """
    check_fixed(adapter)
    (number,) = adapter.check_task_ids([task])
    config = adapter.config
    if config.private:
        adapter, number = take_task(adapter, number), 0
    if not config.is_routed and config.private:
        return _collapse(adapter, torch.ones(1, len(adapter.groups), 1, 1), name=task)
    if adapter.routing_logits is None:
        raise AdapterError(
            f"a {config.method} adapter with policy '{config.policy}' has no routing of its own "
            f"for task '{task}'; collapse its average instead"
        )
    logits_1GQS = adapter.routing_logits.detach()[number : number + 1].cpu()
    weights = routing.mixing_weights(logits_1GQS, config.routing, seeds=None)
    return _collapse(adapter, weights, name=task)


@torch.no_grad()
def _collapse(adapter: Adapter, weights_1GQS: Tensor, *, name: str) -> Adapter:
    like = next(adapter.inventory.parameters())
    single = Adapter(adapter.config.single(), adapter.sites, task_names=[name])
    single = single.to(like.device, like.dtype)
    mixed = adapter.mix(weights_1GQS.to(like) if adapter.config.is_routed else None)
    for stack, sides in zip(adapter.inventory.stacks, mixed, strict=True):
        _store(single, stack, sides, scale=adapter.config.scale)
    return single


@torch.no_grad()
def take_task(adapter: Adapter, number: int) -> Adapter:
    """Extract one task's private inventory and its routing row, as an adapter of that task."""
    like = next(adapter.inventory.parameters())
    shared = replace(adapter.config, private=False)
    extracted = Adapter(shared, adapter.sites, task_names=[adapter.task_names[number]])
    extracted.to(like.device, like.dtype)
    for stack in adapter.inventory.stacks:
        for side in adapter.inventory.sides:
            copy = adapter.inventory.stacked(stack, side)[:, number]
            extracted.inventory.stacked(stack, side).copy_(copy)
    if extracted.routing_logits is not None and adapter.routing_logits is not None:
        extracted.routing_logits.copy_(adapter.routing_logits[number : number + 1])
    return extracted


@torch.no_grad()
def _mean_over_tasks(adapter: Adapter, tasks: Sequence[int]) -> Adapter:
    """The mean of some tasks' private inventories, as a shared inventory under uniform routing."""
    like = next(adapter.inventory.parameters())
    shared = replace(adapter.config, private=False, policy="uniform")
    mean = Adapter(shared, adapter.sites, task_names=["mean"]).to(like.device, like.dtype)
    index = torch.tensor(list(tasks), device=like.device)
    for stack in adapter.inventory.stacks:
        for side in adapter.inventory.sides:
            chosen = adapter.inventory.stacked(stack, side).index_select(1, index)
            mean.inventory.stacked(stack, side).copy_(chosen.mean(1))
    return mean


def _store(single: Adapter, stack: Stack, sides: tuple[Tensor, ...], *, scale: float) -> None:
    """Write mixed sides (N, 1, ...) as the only skill, dividing B by the scale folded into it."""
    inventory = single.inventory
    if single.config.kind == "ia3":
        inventory.stacked(stack, "l").copy_(sides[0][:, None])
        return
    inventory.stacked(stack, "A").copy_(sides[0][:, None])
    inventory.stacked(stack, "B").copy_(sides[1][:, None] / scale)
