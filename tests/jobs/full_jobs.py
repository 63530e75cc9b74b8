"""Jobs that train the backbone too: their rows, recipes, what they leave, and a bench."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mhr_scale.adapters import AdapterConfig, artefact
from mhr_scale.adapters.sites import Site
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import AdaptConfig, BackboneConfig, OptimConfig, ProtocolConfig, VariantConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone, place
from mhr_scale.jobs.adapt_inputs import AdaptInputs, open_jobs
from mhr_scale.jobs.full import WEIGHTS, named_weights
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.open_waves import open_wave
from mhr_scale.jobs.scheduling import PlannedWave
from mhr_scale.jobs.wave import StepValues, Wave

TOY = BackboneConfig(name="builtin:toy", dtype="float32")
TIED = BackboneConfig(
    config={
        "vocab_size": 384,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    },
    dtype="float32",
)
LORA = AdapterConfig(n_skills=1, rank=2)
FULL = VariantConfig(fresh=LORA, kind="backbone", backbone_lr=1e-3)
PLAIN = VariantConfig(fresh=LORA)
ADAMW = OptimConfig(name="adamw", lr=5e-3, weight_decay=0.1, clip_norm=1.0, eps=1e-6)
ADAFACTOR = OptimConfig(lr=3e-3, scale_parameter=True)
RANKED = ProtocolConfig(steps=12, batch_size=4, loss="t_few", warmup_fraction=0.25)
TOLD = replace(RANKED, loss="language_model")


def write_task(folder: Path, name: str) -> None:
    """Letters and, among three choices, their reverse."""
    draw = random.Random(name)
    (folder / name).mkdir(parents=True)
    for fold, count in (("train", 12), ("test", 6)):
        lines = []
        for _ in range(count):
            letters = draw.sample("abcdefghijkl", 5)
            choices = [" ".join(found) for found in (letters[::-1], letters, sorted(letters))]
            row = {"input": " ".join(letters), "target": choices[0], "choices": choices}
            lines.append(json.dumps(row) + "\n")
        (folder / name / f"{fold}.jsonl").write_text("".join(lines))


class Bench:
    """What the verb opens, for one job after the other by hand."""

    def __init__(self, config: AdaptConfig) -> None:
        self.inputs: AdaptInputs = open_jobs(config)
        self.placed = place_backbone(self.inputs.backbone.config, self.inputs.list_sites())
        self.model: Any = self.placed.model

    def open(self, number: int = 0) -> Wave:
        planned = PlannedWave((self.inputs.estimate(self.inputs.jobs[number], step=0),))
        return open_wave(self.inputs, planned, {}, device=self.placed.device)

    def step(self, wave: Wave) -> StepValues:
        wave.adapter.bind(self.placed.adapted)
        self.model.train()
        return wave.train_step(self.placed)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: w.detach().cpu().clone() for name, w in named_weights(self.model).items()}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """The tensors that are not equal bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def place_backbone(config: BackboneConfig, sites: Sequence[Site] = ()) -> PlacedBackbone:
    """The backbone as it is before any job, on a GPU if there is one."""
    return place(Engine({}, timeout_seconds=60.0), config, read_blueprint(config), sites)


def fresh_model(config: BackboneConfig) -> Any:
    """The backbone as it was before the job, without adapters."""
    return place_backbone(config).model


def result_of(config: AdaptConfig, task: str = "one", variant: str = "f") -> dict[str, Any]:
    return json.loads((folder_of(config, task, variant) / "result.json").read_text())


def folder_of(config: AdaptConfig, task: str = "one", variant: str = "f") -> Path:
    return Job(task=task, seed=0, variant=variant).folder(Path(config.run.folder))


def left_by(config: AdaptConfig, task: str = "one", variant: str = "f") -> dict[str, torch.Tensor]:
    """All tensors that a finished job left."""
    folder = folder_of(config, task, variant)
    tensors = dict(load_file(folder / "adapter" / artefact.TENSORS))
    if (folder / WEIGHTS).exists():
        tensors |= load_file(folder / WEIGHTS)
    return tensors
