"""How often the host waits for the device, in the program's own steps: once, at their end."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from device_steps import Training, ranking, wave_step
from device_waits import META, Waits, waits_of

from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    AdaptRunConfig,
    BackboneConfig,
    BatchConfig,
    OptimConfig,
    PretrainConfig,
    ProtocolConfig,
    RunConfig,
    ScheduleConfig,
    ToyTasks,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.families.sending import send, send_numbers
from mhr_scale.passes import validation
from mhr_scale.planning.steps import Shape, make_rows

T5 = {
    "vocab_size": 384,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}
BACKBONES = {
    name: BackboneConfig(config=config, dtype="float32")
    for name, config in {"t5": T5, "llama": LLAMA}.items()
}
MHR = AdapterConfig(n_skills=4, n_splits=4)
METHODS = {
    "lora": AdapterConfig(n_skills=1),
    "ia3": AdapterConfig(kind="ia3", n_skills=1),
    "poly": AdapterConfig(n_skills=4),
    "mhr": MHR,
    "uniform": AdapterConfig(n_skills=4, policy="uniform"),
    "noisy": AdapterConfig(n_skills=4, n_splits=4, policy="noisy"),
    "random": AdapterConfig(n_skills=4, policy="random"),
    "straight_through": AdapterConfig(n_skills=4, policy="straight_through"),
    "private": AdapterConfig(n_skills=1, private=True),
}
#: Rows of three tasks, not equally many of each.
UNEVEN = Shape(rows=5, width=16, depth=8, n_tasks=3)
CHOICES = Shape(rows=3, width=16, depth=4, n_tasks=2, n_choices=3)


# --- what is counted


def device_tensor() -> Any:
    return torch.empty(4, device=META)


WAITING = {
    "tensor": lambda: torch.tensor([1, 2], device=META),
    "as_tensor": lambda: torch.as_tensor([1, 2], device=META),
    "new_tensor": lambda: device_tensor().new_tensor([1.0]),
    "upload": lambda: torch.ones(2).to(META),
    "not pinned": lambda: torch.ones(2).to(META, non_blocking=True),
    "copy_": lambda: device_tensor().copy_(torch.ones(4)),
    "item": lambda: device_tensor().sum().item(),
    "condition": lambda: bool(device_tensor().isfinite().all()),
    "tolist": lambda: device_tensor().tolist(),
    "cpu": lambda: device_tensor().cpu(),
    "mask": lambda: device_tensor()[device_tensor() > 0],
    "list as index": lambda: device_tensor()[[0, 1]],
    "index of the host": lambda: device_tensor()[torch.tensor([0, 1])],
    "assignment": lambda: device_tensor().__setitem__(torch.tensor([0, 1]), 1.0),
    "nonzero": lambda: device_tensor().nonzero(),
    "coalesce": lambda: torch.sparse_coo_tensor(
        torch.empty(1, 2, dtype=torch.long, device=META), torch.empty(2, device=META), (3,)
    ).coalesce(),
}
FREE = {
    "sent": lambda: send(torch.ones(2), META),
    "numbers": lambda: send_numbers([1, 2], META),
    "made there": lambda: torch.zeros(2, device=META),
    "a place": lambda: device_tensor().__setitem__(0, 1.0),
    "under a mask": lambda: device_tensor().masked_fill_(device_tensor() > 0, 0.0),
    "on the host": lambda: torch.tensor([1.0]).item(),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_makes_the_host_wait_is_seen(what: str) -> None:
    assert sum(waits_of(WAITING[what]).values()) == 1


@pytest.mark.parametrize("what", FREE)
def test_what_does_not_is_not(what: str) -> None:
    assert not waits_of(FREE[what])


# --- steps


def places(waits: Waits) -> dict[str, int]:
    """Waits by file."""
    return {place.rpartition(":")[0].rpartition("/")[2]: count for place, count in waits.items()}


def training(method: str, backbone: str, optim: Any, *, packing: bool) -> Training:
    config = PretrainConfig(
        backbone=BACKBONES[backbone],
        adapter=METHODS[method],
        tasks=ToyTasks(suite="toy"),
        optim=OptimConfig(name=optim),
        schedule=ScheduleConfig(steps=10, anneal_routing_steps=8 if method == "mhr" else 0),
        batch=BatchConfig(packing=packing),
        run=RunConfig(folder="unused"),
    )
    return Training(config, [UNEVEN, replace(UNEVEN, rows=4, n_tasks=2)], META)


STEPS = [
    *((method, "t5", "adafactor", False) for method in METHODS),
    *(("mhr", backbone, "adamw", True) for backbone in BACKBONES),
    *(("mhr", "llama", "adafactor", False), ("ia3", "t5", "adamw", True)),
]


@pytest.mark.parametrize(("method", "backbone", "optim", "packing"), STEPS)
def test_a_training_step_of_two_micro_batches_waits_once_at_its_end(
    method: str, backbone: str, optim: Any, packing: bool
) -> None:
    steps = training(method, backbone, optim, packing=packing)
    waits_of(steps.step)  # the first one finds out who uses slots
    assert not waits_of(steps.accumulate)
    assert places(waits_of(steps.step)) == {"trainer.py": 1}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("packing", [True, False])
def test_all_of_a_validation_is_read_at_once(backbone: str, packing: bool) -> None:
    steps = training("mhr", backbone, "adamw", packing=packing)
    rows = make_rows(UNEVEN)

    def validate() -> None:
        validation.reduce_losses(
            steps.placed, steps.adapter, rows, max_rows=2, pad_multiple=8, is_flat=packing
        )

    assert places(waits_of(validate)) == {"validation.py": 1}


WAVES = [
    ("t5", "full", "adafactor", "t_few", True),
    ("t5", "routing", "adamw", "t_few", False),
    ("llama", "routing", "adafactor", "language_model", True),
    ("llama", "full", "adamw", "t_few", False),
]


@pytest.mark.parametrize(("backbone", "kind", "optim", "loss", "packing"), WAVES)
def test_a_step_of_a_wave_waits_once_at_its_end(
    backbone: str, kind: Any, optim: Any, loss: Any, packing: bool
) -> None:
    variant = VariantConfig(fresh=MHR)
    object.__setattr__(variant, "kind", kind)  # from a run it would start otherwise
    config = AdaptConfig(
        backbone=BACKBONES[backbone],
        variants={"v": variant},
        tasks=ToyTasks(suite="toy", fold="held_out"),
        optim=OptimConfig(name=optim),
        protocol=ProtocolConfig(loss=loss),
        waves=WavesConfig(packing=packing),
        run=AdaptRunConfig(folder="unused"),
    )
    _, step = wave_step(config, replace(CHOICES, n_tasks=1), META, n_jobs=3)
    waits_of(step)
    assert places(waits_of(step)) == {"wave.py": 1}


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        *((name, {"is_flat": is_flat}) for name in BACKBONES for is_flat in (True, False)),
        ("llama", {"is_shared": True}),
    ],
)
def test_the_scores_of_a_ranking_batch_are_read_at_once(backbone: str, options: Any) -> None:
    step = ranking(BACKBONES[backbone], MHR, CHOICES, META, **options)
    assert places(waits_of(step)) == {"scoring.py": 1}
