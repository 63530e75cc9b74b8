"""A tiny T5 v1.1 with the numbers of a golden file (`golden_vectors`), on any device.

What is found comes back under the names that the file has.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.adapters import Adapter, attach
from mhr_scale.adapters.collapse import average
from mhr_scale.config import AdapterConfig, OptimConfig, ScheduleConfig
from mhr_scale.passes.losses import language_model
from mhr_scale.training.optim import (
    clip_gradients,
    gradient_norm,
    make_optimizer,
    rate_factor,
    set_rates,
)

CPU = torch.device("cpu")
LAYOUTS = {"standard": "full", "light": "light"}
GRANULARITIES = {"finegrained": "linear", "layerwise": "sublayer", "blockwise": "block"}
SIDES = {"lora_a": "A", "lora_b": "B"}


def relative_error(value: Tensor, golden: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float(
        (value.to(golden.device) - golden).abs().max() / golden.abs().max().clamp(min=1e-30)
    )


def make(
    golden: SimpleNamespace, device: torch.device = CPU
) -> tuple[T5ForConditionalGeneration, Adapter]:
    """The model, and an adapter on it, with the file's numbers."""
    meta, tensors = golden.meta, golden.tensors
    model = T5ForConditionalGeneration(T5Config(**meta["backbone_config"]))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    weights = {k.removeprefix("backbone."): v for k, v in tensors.items() if "backbone." in k}
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all("embed_tokens" in key for key in result.missing_keys)
    config = AdapterConfig(
        layout=LAYOUTS[meta["layout"]],
        granularity=GRANULARITIES[meta["granularity"]],
        rank=meta["rank"],
        alpha=meta["alpha"],
        n_skills=meta["skills"],
        n_splits=meta["heads"],
    )
    model.to(device)
    adapter = attach(model, config, tasks=[str(task) for task in range(meta["tasks"])])
    for name, tensor in ours(adapter, golden, "adapter").items():
        tensor.copy_(tensors[name])
    return model, adapter


def ours(
    adapter: Adapter, golden: SimpleNamespace, prefix: str, *, gradients: bool = False
) -> dict[str, Tensor]:
    """Our values or gradients under the reference's names (`<linear>.lora_a`, ...)."""
    found = {}
    for stack in adapter.inventory.stacks:
        for row, member in enumerate(stack.members):
            for theirs, side in SIDES.items():
                parameter = adapter.inventory.stacked(stack, side)
                values = parameter.grad if gradients else parameter.data
                found[f"{prefix}.{adapter.sites[member].name}.{theirs}"] = values[row]
    config, selectors = adapter.config, golden.meta["selector_of"]
    logits = adapter.routing_logits
    values = logits.grad.to_dense() if gradients else logits.data
    for site in adapter.sites:
        group = adapter.groups.index(site.routing_group(config.granularity, config.block_span))
        name = f"{prefix}.{selectors[site.name]}.selector.module_logits"
        found[name] = (
            values[:, group].flatten(1)
            if gradients
            else values[:, group].view(len(adapter.task_names), -1)
        )
    expected = {name for name in golden.tensors if name.startswith(f"{prefix}.")}
    assert expected == set(found)
    return found


def batch(golden: SimpleNamespace, number: int) -> dict[str, Tensor]:
    """One batch of the file."""
    prefix = f"batch{number}."
    return {k.removeprefix(prefix): v for k, v in golden.tensors.items() if k.startswith(prefix)}


def forward(model: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of a batch, and the mean loss of its target tokens."""
    names = ("input_ids", "attention_mask", "labels")
    given = {name: tensors[name].to(model.device) for name in names}
    logits = model(**given).logits
    loss = language_model(logits, given["labels"])
    return logits, loss.sum.sum() / loss.count.sum()


def evaluate(model: Any, adapter: Adapter, golden: SimpleNamespace) -> dict[str, Tensor]:
    """Logits and loss of the batch after the training ones; every row is of an average's task."""
    tensors = batch(golden, golden.meta["training"]["total_steps"])
    if len(adapter.task_names) == 1:
        tensors["task_ids"] = torch.zeros_like(tensors["task_ids"])
    with torch.no_grad(), adapter.slots(tensors["task_ids"]):
        logits, loss = forward(model, tensors)
    return {"logits": logits, "loss": loss}


def train(model: Any, adapter: Adapter, golden: SimpleNamespace) -> dict[str, Tensor]:
    """The file's training run: losses and gradient norms of its steps."""
    settings = golden.meta["training"]
    schedule = ScheduleConfig(steps=settings["total_steps"], warmup_steps=settings["warmup_steps"])
    optimizer = make_optimizer(
        adapter, OptimConfig(lr=settings["lr_modules"], routing_lr=settings["lr_routing"])
    )
    curve, norms = [], []
    for step in range(schedule.steps):
        tensors = batch(golden, step)
        set_rates(optimizer, rate_factor(schedule, step))
        with adapter.slots(tensors["task_ids"]) as slots:
            _, mean = forward(model, tensors)
            slots.backward(mean)
        norm = gradient_norm(adapter.parameters())
        clip_gradients(adapter.parameters(), norm, settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        curve.append(mean.detach())
        norms.append(norm)
    return {"losses": torch.stack(curve), "grad_norms": torch.stack(norms)}


def before_training(golden: SimpleNamespace, device: torch.device = CPU) -> SimpleNamespace:
    """Logits, loss and gradients of the batch after the training ones, before training."""
    model, adapter = make(golden, device)
    found = evaluate(model, adapter, golden)
    tensors = batch(golden, golden.meta["training"]["total_steps"])
    with adapter.slots(tensors["task_ids"]) as slots:
        slots.backward(forward(model, tensors)[1])
    return SimpleNamespace(eval=found, gradients=ours(adapter, golden, "grad", gradients=True))


def after_training(golden: SimpleNamespace, device: torch.device = CPU) -> SimpleNamespace:
    """Curves of the training run, final parameters, and the average they collapse to."""
    model, adapter = make(golden, device)
    curves = train(model, adapter, golden)
    final = evaluate(model, adapter, golden)
    parameters = ours(adapter, golden, "final")
    mean = average(adapter).to(device)
    mean.linears = adapter.linears
    averaged = evaluate(model, mean, golden)
    return SimpleNamespace(curves=curves, final=final, parameters=parameters, average=averaged)


def errors(found: dict[str, Tensor], golden: SimpleNamespace, prefix: str) -> dict[str, float]:
    """How far each tensor is from the file's (`relative_error`)."""
    return {
        name: relative_error(value, golden.tensors[name if "." in name else f"{prefix}.{name}"])
        for name, value in found.items()
    }
