"""A small T5 in 8 and 4 bits, built as a verb does, and the whole weights it stands for."""

from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.adapters import Adapter, attach
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import AdapterConfig, BackboneConfig
from mhr_scale.engine.engine import Engine

SIZES = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 384,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
MHR = AdapterConfig(layout="full", rank=2, n_skills=4, n_splits=4)
TASK_IDS = (0, 1, 1, 2)


def build(kind: str, **settings: Any) -> Any:
    """The backbone where this process runs, by default of random weights in float32."""
    given = {"dtype": "float32", **settings}
    if "name" not in given:
        given["config"] = given.get("config", SIZES)
    config = BackboneConfig(quantise=kind, **given)  # type: ignore[arg-type]
    return Engine({}, timeout_seconds=60).build(config, read_blueprint(config))


def batch(model: Any, rows: int = 4) -> dict[str, Tensor]:
    """Fixed rows on the model's device."""
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(3, 300, (rows, 9), generator=generator).to(model.device),
        "labels": torch.randint(3, 300, (rows, 5), generator=generator).to(model.device),
    }


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**batch(model)).logits
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def quantised(model: Any) -> dict[str, nn.Module]:
    kinds = ("Linear8bitLt", "Linear4bit")
    return {name: m for name, m in model.named_modules() if type(m).__name__ in kinds}


def whole_weight(linear: Any) -> Tensor:
    """The weight that a quantised linear stands for."""
    from bitsandbytes import functional

    if type(linear).__name__ == "Linear4bit":
        found: Tensor = functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        return found
    scale = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
    return linear.weight.data.float() * scale[:, None] / 127.0


def with_whole_weights(model: Any, bare: Any) -> Any:
    """`bare`, an unquantised model, with the weights that those of `model` stand for."""
    for name, linear in quantised(model).items():
        bare.get_submodule(name).weight.data.copy_(whole_weight(linear))
    return bare


def make_adapter(model: Any) -> Adapter:
    adapter = attach(model, MHR, tasks=("a", "b", "c"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def gradients(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    model.train()
    with adapter.slots(TASK_IDS) as slots:
        slots.backward(model(**batch(model)).loss)
    found = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad(set_to_none=True)
    return found
