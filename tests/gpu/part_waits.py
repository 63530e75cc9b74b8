"""How often the host waits for the device, and how many kernels an adapted linear adds.

On a GPU torch's own warnings are counted, and the kernels that ran; at toy size the meta device
stands for one, as in the tests.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from adapters.tiny import Recorder
from board import Board, Found, Scale
from device_steps import Training, ranking, wave_step
from device_waits import META, counted, waits_of

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
from mhr_scale.engine.gradients import require_input_gradients
from mhr_scale.passes.filled import filled
from mhr_scale.passes.validation import forward
from mhr_scale.planning.steps import Shape

METHODS = {
    "LoRA": AdapterConfig(n_skills=1),
    "MHR": AdapterConfig(n_skills=8, n_splits=8),
    "noisy MHR": AdapterConfig(n_skills=8, n_splits=8, policy="noisy"),
}
#: What is counted: a kind of step, whose backbone, whether its rows are packed.
STEPS = [
    *((method, "T5", True) for method in METHODS),
    *(("MHR", "T5", False), ("MHR", "Llama", True)),
    *((kind, "T5", packing) for kind in ("wave", "ranking") for packing in (True, False)),
    *((kind, "Llama", True) for kind in ("wave", "ranking")),
]
#: Blocks of each stack of the two models that tell what a linear adds, and what all share.
SHALLOW, DEEPER = 1, 2
#: Kernels that an adapted linear may add to the forward and backward pass of padded rows.
MOST_KERNELS = 8.0


def measure(board: Board, scale: Scale) -> None:
    """Steps of training by method, of a wave, and a ranking batch; kernels of two methods."""
    device = scale.device if scale.on_gpu else META
    for what, name, packing in STEPS:
        entry = f"{what}, {name}, {'packed' if packing else 'padded'}"
        step = partial(open_step, what, backbone(name, scale), device, packing=packing)
        board.run(entry, partial(once, step, device))
    for name in ("T5", "Llama"):
        for method in ("LoRA", "MHR"):
            board.run(f"kernels, {method}, {name}", partial(per_linear, method, name, scale))


def open_step(
    what: str, own: BackboneConfig, device: torch.device, *, packing: bool
) -> Callable[[], object]:
    """A step that can be taken again and again."""
    if what == "wave":
        return wave(own, device, packing=packing)
    if what == "ranking":
        return ranking(own, METHODS["MHR"], shape(n_choices=4), device, is_flat=packing)
    return training(what, own, device, packing=packing).step


def once(make: Callable[[], Callable[[], object]], device: torch.device) -> Found:
    """Waits of one step, when all that is made once has been made."""
    step = make()
    waits_of(step, device=device)
    waits = waits_of(step, device=device)
    where = "; ".join(f"{place} ({count})" for place, count in waits.items())
    n_waits = sum(waits.values())
    return Found({"waits": n_waits, "where": where}, holds=n_waits == 1, goal="1 wait, at the end")


def per_linear(method: str, name: str, scale: Scale) -> Found:
    """Kernels that a linear adds, and those of a step that do not grow with the model."""
    (added, linears), (more, more_linears) = (
        added_kernels(method, backbone(name, scale, depth=depth), scale)
        for depth in (SHALLOW, DEEPER)
    )
    each = (more - added) / (more_linears - linears)
    return Found(
        {"per_linear": each, "per_step": added - each * linears},
        holds=each <= MOST_KERNELS,
        goal=f"at most {MOST_KERNELS:g} a linear",
    )


def added_kernels(method: str, own: BackboneConfig, scale: Scale) -> tuple[int, int]:
    """Kernels of a forward and backward pass beside the bare backbone's, and adapted linears."""
    device = scale.device if scale.on_gpu else META
    steps = training(method, own, device, packing=False)
    placed, adapter = steps.placed, steps.adapter
    require_input_gradients(placed.model, placed.family)
    placed.model.train()
    with nullcontext() if scale.on_gpu else counted():
        packed = steps.micro_batches[0].to(device)

        def bare() -> None:
            with adapter.off(), packed.in_use():
                forward(placed, packed).sum.sum().backward()

        def ours() -> None:
            with filled(adapter, packed) as slots:
                slots.backward(forward(placed, packed).sum.sum())
            adapter.zero_grad()

        found = []
        for work in (bare, ours):
            work()
            found.append(count_kernels(work, device))
    return found[1] - found[0], len(adapter.linears)


def count_kernels(work: Callable[[], object], device: torch.device) -> int:
    """Kernels that ran on the GPU, or operations that would start one."""
    if device == META:
        with Recorder() as recorder:
            work()
        return sum(recorder.kernels.values())
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize(device)
    events: Any = record.events()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)


# -- what runs -------------------------------------------------------------------------------------


def backbone(name: str, scale: Scale, *, depth: int = 1) -> BackboneConfig:
    """Random weights: waits depend on no size."""
    width, heads = (32, 4) if scale.is_tiny else (512, 8)
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 384,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
    }
    if name == "T5":
        config = {
            "vocab_size": 384,
            "d_model": width,
            "d_kv": width // heads,
            "d_ff": 2 * width,
            "num_layers": depth,
            "num_heads": heads,
            "feed_forward_proj": "gated-gelu",
        }
    return BackboneConfig(config=config, dtype="bfloat16")


def shape(*, n_tasks: int = 3, n_choices: int = 1) -> Shape:
    """Rows of tasks that have not equally many."""
    return Shape(rows=5, width=16, depth=8, n_tasks=n_tasks, n_choices=n_choices)


def training(method: str, own: BackboneConfig, device: torch.device, *, packing: bool) -> Training:
    """Steps of two micro batches."""
    config = PretrainConfig(
        backbone=own,
        adapter=METHODS[method],
        tasks=ToyTasks(suite="toy"),
        optim=OptimConfig(),
        schedule=ScheduleConfig(steps=100),
        batch=BatchConfig(packing=packing),
        run=RunConfig(folder="unused"),
    )
    return Training(config, [shape(), shape(n_tasks=2)], device)


def wave(own: BackboneConfig, device: torch.device, *, packing: bool) -> Callable[[], object]:
    """A step of four jobs."""
    config = AdaptConfig(
        backbone=own,
        variants={"v": VariantConfig(fresh=METHODS["MHR"])},
        tasks=ToyTasks(suite="toy", fold="held_out"),
        optim=OptimConfig(),
        protocol=ProtocolConfig(),
        waves=WavesConfig(packing=packing),
        run=AdaptRunConfig(folder="unused"),
    )
    return wave_step(config, shape(n_tasks=1, n_choices=3), device, n_jobs=4)[1]
