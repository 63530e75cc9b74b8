"""Adapted linears, tiny models and every method: the device against stored and CPU numbers."""

from collections.abc import Mapping

import golden_layers
import golden_losses
import golden_models
import golden_vectors
import torch
from adapters import tiny
from adapters.every_method import CONFIGS, SEEDS, TASK_IDS
from board import Board, Found, Scale
from compared import CPU, EPS, distance, furthest, held, without_tf32
from torch import Tensor

from mhr_scale.adapters import AdapterConfig

FLOAT32 = 1e-5
#: Of what a training run leaves: each of its steps sees the roundings of those before.
TRAINED = 1e-4
#: Roundings to half precision, one behind the other, that a number may have seen in one direction.
HALF = 8.0


def measure(board: Board, scale: Scale) -> None:
    """Golden files, then every row of the table of methods in float32 and in bfloat16."""
    without_tf32()
    board.run("float32 products", lambda: products(scale))
    board.run("golden layers", lambda: layers(scale))
    board.run("golden losses", lambda: losses(scale))
    for path in golden_vectors.files("model_*.safetensors"):
        golden = golden_vectors.read(path)
        board.run(f"golden {path.stem}", lambda golden=golden: model(golden, scale))
    board.run("methods", lambda: methods(scale))
    board.run("methods in bf16", lambda: methods_in_half(scale))


def products(scale: Scale) -> Found:
    """A product of float32 as the other entries need it: one of TF32 is a thousand times as far."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, 256, generator=generator) for _ in range(2))
    found = x.to(scale.device) @ y.to(scale.device)
    values = {"error": distance({"": found}, {"": x.double() @ y.double()})}
    return held(values, 1e-6, "within 1e-6 of float64's: no TF32, whatever the environment says")


def layers(scale: Scale) -> Found:
    """One adapted linear: its output, its average's, and the gradients of every tensor."""
    most, values = golden_layers.DTYPES, {}
    for dtype in most:
        errors = []
        for path in golden_vectors.files("layer_*.safetensors"):
            layer = golden_vectors.read(path)
            found = golden_layers.run(golden_layers.make(layer, dtype, scale.device), layer, dtype)
            errors += [
                golden_layers.relative_error(value, layer.tensors[name])
                for name, value in found.items()
            ]
        values[str(dtype).removeprefix("torch.")] = max(errors)
    return Found(
        values,
        holds=all(e < m for e, m in zip(values.values(), most.values(), strict=True)),
        goal="outputs and gradients within 1e-10 of the reference's in float64, 1e-5 in float32",
    )


def losses(scale: Scale) -> Found:
    """T-Few's three losses and the scores of choices, in float64."""
    values = {}
    for path in golden_vectors.files("tfew_losses_*.safetensors"):
        stored = golden_vectors.read(path)
        found = golden_losses.find(stored, scale.device)
        ours = {
            name: getattr(found, name).sum.sum() / getattr(found, name).count.sum()
            for name in ("lm", "mc", "ul")
        }
        ours["scores"] = found.scores_BC
        values[path.stem] = furthest(ours, {name: stored.tensors[name] for name in ours})
    return held(values, 1e-8, "within 1e-8 of the reference's in float64")


def model(golden: object, scale: Scale) -> Found:
    """Logits, loss and gradients before training; the run; parameters, logits, average after."""
    before = golden_models.before_training(golden, scale.device)
    after = golden_models.after_training(golden, scale.device)

    def worst(found: Mapping[str, Tensor], prefix: str) -> float:
        return max(golden_models.errors(found, golden, prefix).values())

    values = {
        "logits": worst(before.eval, "eval"),
        "gradients": worst(before.gradients, "grad"),
        "curve": worst(after.curves, "train"),
        "parameters": worst(after.parameters, "final"),
        "logits_after": worst(after.final, "final_eval"),
        "average": worst(after.average, "average_eval"),
    }
    most = {"logits": FLOAT32, "gradients": FLOAT32}
    return Found(
        values,
        holds=all(value <= most.get(name, TRAINED) for name, value in values.items()),
        goal="within 1e-5 of the reference's before training, 1e-4 from the run on (float32)",
    )


def methods(scale: Scale) -> Found:
    """Logits and gradients of every method, noise of seeds included, in float32."""
    values = {}
    for name, config in configs(scale).items():
        truth = step(config, torch.float64, CPU)
        values[name] = furthest(step(config, torch.float32, scale.device), truth)
    return held(values, FLOAT32, "logits and gradients within 1e-5 of the CPU's in float64")


def methods_in_half(scale: Scale) -> Found:
    """The same over a backbone in bfloat16, against its weights in float64 on the CPU."""
    values = {}
    for name, config in configs(scale).items():
        truth = step(config, torch.float64, CPU, is_rounded=True)
        values[name] = distance(step(config, torch.bfloat16, scale.device), truth)
    return held(
        values,
        HALF * EPS[torch.bfloat16],
        "norms of differences from float64 within 8 eps of bfloat16 (0.0625)",
    )


def configs(scale: Scale) -> dict[str, AdapterConfig]:
    """The methods; at toy size those that have most to compute."""
    names = ("MHR", "noisy", "Random", "MHR-(IA)3") if scale.is_tiny else tuple(CONFIGS)
    return {name: CONFIGS[name] for name in names}


def step(
    config: AdapterConfig, dtype: torch.dtype, device: torch.device, *, is_rounded: bool = False
) -> dict[str, Tensor]:
    """Logits and gradients over a tiny T5 in `dtype`; the adapter in float32 or more.

    If it is rounded, the backbone has the weights that it has in bfloat16.
    """
    whole = torch.float64 if dtype == torch.float64 else torch.float32
    _, source = tiny.make_adapted(config, dtype=whole)
    bare = tiny.make_t5()
    bare = bare.to(torch.bfloat16) if is_rounded else bare
    backbone = bare.to(device, dtype).train()
    adapter = tiny.attach_copy(backbone, source)
    seeds = {"seeds": SEEDS}
    found = tiny.gradients(backbone, adapter, TASK_IDS, **seeds)
    return {**found, "logits": tiny.logits(backbone, adapter, TASK_IDS, **seeds)}
