"""Short fine-tunings of a LoRA on one toy task."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from processes import read_metrics
from safetensors.torch import load_file
from torch import Tensor

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.adapters.collapse import average
from mhr_scale.adapters.peft_folders import write_peft_lora
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.config import (
    BackboneConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    FinetuneShotsConfig,
    ProtocolConfig,
    ScoringConfig,
    ToyTasks,
)

TOY = BackboneConfig(name="builtin:toy", dtype="float32")
TASK = "sort.plus4.after"
MHR = AdapterConfig(layout="full", rank=2, n_skills=4, n_splits=4)


def make_adapter(config: BackboneConfig, settings: AdapterConfig = MHR) -> Adapter:
    """An adapter of the full layout with small numbers everywhere."""
    with torch.device("meta"):
        model = make_model(read_blueprint(config))
    sites = find_sites(model, settings.layout)
    adapter = Adapter(settings, sites, task_names=("a", "b"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.inventory.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return adapter


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def base_model(config: BackboneConfig) -> str:
    return str(read_blueprint(config).folder)


def export_lora(folder: Path) -> Path:
    """The averaged adapter of a toy inventory as a PEFT folder."""
    return write_peft_lora(average(make_adapter(TOY)), folder, base_model=base_model(TOY))


def toy(adapter: Path, folder: Path, **changes: Any) -> FinetuneConfig:
    config = FinetuneConfig(
        adapter=str(adapter),
        backbone=TOY,
        tasks=ToyTasks(suite="toy", fold="held_out"),
        task=TASK,
        shots=FinetuneShotsConfig(seed=0, count=16),
        protocol=ProtocolConfig(
            steps=12,
            loss="language_model",
            warmup_fraction=0.1,
            max_input_tokens=32,
            max_target_tokens=32,
        ),
        optim=FinetuneOptimConfig(name="adamw", lr=5e-3),
        scoring=ScoringConfig(metric="accuracy", examples=6),
        run=FinetuneRunConfig(folder=str(folder), log_every=1, save_every=4),
    )
    return replace(config, **changes)
