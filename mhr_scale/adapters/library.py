"""A library of LoRAs: an adapter whose tasks have one each, or single LoRAs made one adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.adapters.arrow import Arrow
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.methods import Adapter
from mhr_scale.errors import AdapterError


@torch.no_grad()
def join(singles: Mapping[str, Adapter], *, place: str) -> Adapter:
    """One adapter with these LoRAs as private ones, by the names of their tasks.

    Ranks and scales may differ (`at_one_rank`). Raises
    `AdapterError` for what is no single LoRA, or sits on other linears than the first.
    """
    name, first = next(iter(singles.items()))
    for other, single in singles.items():
        config = single.config
        if not is_single_lora(config):
            raise AdapterError(
                f"{place}: {other} is {config.method}, and a library is of single LoRAs; export "
                "its average or its tasks' LoRAs there"
            )
        if single.sites != first.sites:
            raise AdapterError(
                f"{place}: {other} is made for other linears ({len(single.sites)}) than {name} "
                f"({len(first.sites)}): a library has one backbone and one layout"
            )
    config, loras = at_one_rank(list(singles.values()))
    library = Adapter(replace(config, private=True), first.sites, task_names=list(singles))
    for key, tensor_TQS in library.inventory.named_tensors():
        for number, lora in enumerate(loras):
            tensor_TQS[number].copy_(lora[key])
    return library


def route_by_token(adapter: Adapter, *, top_k: int = 4, temperature: float = 1.0) -> Adapter:
    """Let every token choose `top_k` of an adapter's LoRAs; returns the adapter that does.

    They are its tasks' private ones, or the skills of an inventory without splits. Raises
    `AdapterError` for an adapter that is no library of LoRAs, or has too few.
    """
    config = adapter.config
    if config.kind == "lora" and config.is_routed and config.n_splits == 1 and not config.private:
        adapter = _skills_as_tasks(adapter)
    config, n_experts = adapter.config, len(adapter.task_names)
    if config.kind != "lora" or config.is_routed or not config.private:
        raise AdapterError(
            "Arrow routes between LoRAs: of tasks (adapter.private, one skill), skills without "
            f"splits, or folders; this is {config.method} of kind {config.kind} with "
            f"{config.n_skills} skill(s) and {config.n_splits} split(s)"
        )
    if not 1 <= top_k <= n_experts:
        raise AdapterError(f"arrow.top_k: {top_k}, of {n_experts} LoRA(s); set 1 to {n_experts}")
    if not temperature > 0.0:
        raise AdapterError(f"arrow.temperature: {temperature} is not above 0")
    adapter.by_token = Arrow(top_k=top_k, temperature=temperature)
    return adapter


@torch.no_grad()
def _skills_as_tasks(adapter: Adapter) -> Adapter:
    """The skills of an inventory without splits as private LoRAs."""
    config = replace(adapter.config.single(), private=True)
    names = [f"skill {number}" for number in range(adapter.config.n_skills)]
    library = Adapter(config, adapter.sites, task_names=names)
    for stack in library.inventory.stacks:
        for side in library.inventory.sides:
            skills = adapter.inventory.stacked(stack, side)[:, 0]
            library.inventory.stacked(stack, side)[:, :, 0, 0] = skills
    return library


def check_fixed(adapter: Adapter) -> None:
    """Raise `AdapterError` if what an adapter computes depends on the token."""
    if adapter.by_token is not None:
        raise AdapterError(
            "under Arrow every token has weights of its own, which no single LoRA expresses: take "
            "the adapter without it, its average or the LoRAs of its tasks"
        )


def is_single_lora(config: AdapterConfig) -> bool:
    """Whether an adapter is one pair A, B per linear."""
    return config.kind == "lora" and not (config.is_routed or config.private)


def at_one_rank(singles: Sequence[Adapter]) -> tuple[AdapterConfig, list[dict[str, Tensor]]]:
    """Single LoRAs on the same linears at their greatest rank, filled up with zeros, and one scale.

    Returns the settings of the first with that rank and scale, and the tensors of each by the names
    of its inventory. The scale is theirs, or 1 where they differ: then B has it.
    """
    rank = max(single.config.rank for single in singles)
    scales = {single.config.scale for single in singles}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors = []
    for single in singles:
        more, factor = rank - single.config.rank, single.config.scale / scale
        tensors.append(
            {
                key: F.pad(tensor, (0, more) if key.endswith(".A") else (0, 0, 0, more))
                * (1.0 if key.endswith(".A") else factor)
                for key, tensor in single.inventory.named_tensors()
            }
        )
    return replace(singles[0].config, rank=rank, alpha=scale * rank), tensors
