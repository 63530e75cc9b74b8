"""A tiny T5 v1.1 with adapters against the reference: logits, gradients, a whole training run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden_vectors import read
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

LAYOUTS = {"standard": "full", "light": "light"}
GRANULARITIES = {"finegrained": "linear", "layerwise": "sublayer", "blockwise": "block"}
SIDES = {"lora_a": "A", "lora_b": "B"}


def relative_error(value: Tensor, golden: Tensor) -> float:
    return float((value - golden).abs().max() / golden.abs().max().clamp(min=1e-30))


def make(golden: SimpleNamespace) -> tuple[nn.Module, Adapter]:
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
    prefix = f"batch{number}."
    return {k.removeprefix(prefix): v for k, v in golden.tensors.items() if k.startswith(prefix)}


def forward(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    return model(
        input_ids=tensors["input_ids"],
        attention_mask=tensors["attention_mask"],
        labels=tensors["labels"],
    ).logits


def evaluate(model: nn.Module, adapter: Adapter, golden: SimpleNamespace) -> dict[str, Tensor]:
    tensors = batch(golden, golden.meta["training"]["total_steps"])
    with torch.no_grad(), adapter.slots(tensors["task_ids"]):
        logits = forward(model, tensors)
    loss = language_model(logits, tensors["labels"])
    return {"logits": logits, "loss": loss.sum.sum() / loss.count.sum()}


def train(model: nn.Module, adapter: Adapter, golden: SimpleNamespace) -> dict[str, Tensor]:
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
            loss = language_model(forward(model, tensors), tensors["labels"])
            mean = loss.sum.sum() / loss.count.sum()
            slots.backward(mean)
        norm = gradient_norm(adapter.parameters())
        clip_gradients(adapter.parameters(), norm, settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        curve.append(mean.detach())
        norms.append(norm)
    return {"losses": torch.stack(curve), "grad_norms": torch.stack(norms)}


@pytest.fixture(scope="module")
def golden(model_file: Path) -> SimpleNamespace:
    return read(model_file)


@pytest.fixture(scope="module")
def before(golden: SimpleNamespace) -> SimpleNamespace:
    """Logits, loss and gradients of the batch after the training ones, before training."""
    model, adapter = make(golden)
    found = evaluate(model, adapter, golden)
    tensors = batch(golden, golden.meta["training"]["total_steps"])
    with adapter.slots(tensors["task_ids"]) as slots:
        loss = language_model(forward(model, tensors), tensors["labels"])
        slots.backward(loss.sum.sum() / loss.count.sum())
    return SimpleNamespace(eval=found, gradients=ours(adapter, golden, "grad", gradients=True))


@pytest.fixture(scope="module")
def after(golden: SimpleNamespace) -> SimpleNamespace:
    """Curves of the training run, final parameters, and the average they collapse to."""
    model, adapter = make(golden)
    curves = train(model, adapter, golden)
    final = evaluate(model, adapter, golden)
    parameters = ours(adapter, golden, "final")
    mean = average(adapter)
    mean.linears = adapter.linears
    tensors = batch(golden, golden.meta["training"]["total_steps"])
    tensors["task_ids"] = torch.zeros_like(tensors["task_ids"])
    with torch.no_grad(), mean.slots(tensors["task_ids"]):
        logits = forward(model, tensors)
    loss = language_model(logits, tensors["labels"])
    averaged = {"logits": logits, "loss": loss.sum.sum() / loss.count.sum()}
    return SimpleNamespace(curves=curves, final=final, parameters=parameters, average=averaged)


def faults(found: dict[str, Tensor], golden: SimpleNamespace, prefix: str) -> dict[str, float]:
    errors = {
        name: relative_error(value, golden.tensors[name if "." in name else f"{prefix}.{name}"])
        for name, value in found.items()
    }
    return {name: error for name, error in errors.items() if error >= 1e-5}


def test_logits_and_loss_equal_the_reference(
    before: SimpleNamespace, golden: SimpleNamespace
) -> None:
    assert faults(before.eval, golden, "eval") == {}


def test_gradients_equal_the_reference(before: SimpleNamespace, golden: SimpleNamespace) -> None:
    assert faults(before.gradients, golden, "grad") == {}


def test_loss_and_gradient_norm_curves_equal_the_reference(
    after: SimpleNamespace, golden: SimpleNamespace
) -> None:
    assert faults(after.curves, golden, "train") == {}


def test_final_parameters_equal_the_reference(
    after: SimpleNamespace, golden: SimpleNamespace
) -> None:
    assert faults(after.parameters, golden, "final") == {}


def test_final_logits_equal_the_reference(after: SimpleNamespace, golden: SimpleNamespace) -> None:
    assert faults(after.final, golden, "final_eval") == {}


def test_average_equals_the_reference(after: SimpleNamespace, golden: SimpleNamespace) -> None:
    assert faults(after.average, golden, "average_eval") == {}
