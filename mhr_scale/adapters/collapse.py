"""Collapsing slots: one ordinary adapter from an inventory, its mean or a task's routing."""

from dataclasses import replace

import torch
from torch import Tensor

from mhr_scale.adapters import routing
from mhr_scale.adapters.inventory import Stack
from mhr_scale.adapters.methods import Adapter
from mhr_scale.errors import AdapterError


def average(adapter: Adapter) -> Adapter:
    """Return the averaged adapter: the mean of A and of B over the skills, routing ignored.

    The result is one ordinary LoRA (or (IA)3 vector) of the same rank (method notes 1.4, 1.6).
    Under policy `private` it is the mean over the tasks.
    """
    n_pairs = adapter.inventory.n_pairs
    shape = (1, len(adapter.groups), adapter.config.n_splits, n_pairs)
    return _collapse(adapter, torch.full(shape, 1.0 / n_pairs), name="average")


def collapse(adapter: Adapter, task: str) -> Adapter:
    """Return one training task's adapter as an ordinary LoRA or (IA)3 vector.

    Raises `AdapterError` if the task is unknown or the adapter has no per-task routing to fix.
    """
    (number,) = adapter.check_task_ids([task])
    config = adapter.config
    if config.policy == "private":
        return _pick(adapter, number, name=task)
    if adapter.routing_logits is None:
        raise AdapterError(
            f"a {config.method} adapter with policy '{config.policy}' has no routing of its own "
            f"for task '{task}'; collapse its average instead"
        )
    logits_1GQS = adapter.routing_logits.detach()[number : number + 1].cpu()
    weights = routing.mixing_weights(logits_1GQS, config, seeds=None)
    return _collapse(adapter, weights, name=task)


def _single(adapter: Adapter, name: str) -> Adapter:
    config = replace(
        adapter.config,
        n_skills=1,
        n_splits=1,
        policy="learned",
        granularity="linear",
        block_span=1,
    )
    return Adapter(config, adapter.sites, task_names=[name])


@torch.no_grad()
def _collapse(adapter: Adapter, weights_1GQS: Tensor, *, name: str) -> Adapter:
    like = next(adapter.inventory.parameters())
    single = _single(adapter, name).to(like.device, like.dtype)
    mixed = adapter.mix(weights_1GQS.to(like))
    for stack, sides in zip(adapter.inventory.stacks, mixed, strict=True):
        _store(single, stack, sides, scale=adapter.config.scale)
    return single


@torch.no_grad()
def _pick(adapter: Adapter, skill: int, *, name: str) -> Adapter:
    like = next(adapter.inventory.parameters())
    single = _single(adapter, name).to(like.device, like.dtype)
    for stack in adapter.inventory.stacks:
        for side in adapter.inventory.sides:
            pair = adapter.inventory.stacked(stack, side)[:, :, skill : skill + 1]
            single.inventory.stacked(stack, side).copy_(pair)
    return single


def _store(single: Adapter, stack: Stack, sides: tuple[Tensor, ...], *, scale: float) -> None:
    """Write mixed sides (N, 1, ...) as the only skill; the scale folded into B is taken out."""
    inventory = single.inventory
    if single.config.kind == "ia3":
        inventory.stacked(stack, "l").copy_(sides[0][:, None])
        return
    inventory.stacked(stack, "A").copy_(sides[0][:, None])
    inventory.stacked(stack, "B").copy_(sides[1][:, None] / scale)
