"""What `step_time.py` compares over a frozen decoder-only backbone of Llama's shape.

A row is a prompt and its target, `tokens` and `targets` long, prompts padded on their left. Logits
are had at targets only unless a way says `all logits`: those of PEFT as its users run it, whose
loss is the model's own over labels that are -100 in the prompt. Shape letters: B rows, L positions,
D target positions, V vocabulary, H width.
"""

import warnings
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import numpy as np
import torch
from step_time_ways import (
    CPU,
    N_TASKS,
    SWITCHES,
    Maker,
    Setting,
    Way,
    made,
    ours,
    plain_way,
    same_weights,
)
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.adapters import AdapterConfig
from mhr_scale.config import BackboneConfig
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.families.table import known_fields
from mhr_scale.passes.losses import language_model

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA = {
    "vocab_size": 49152,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
CAUSAL_SHAPES = {
    "llama": LLAMA,
    "llama-tiny": {
        **LLAMA,
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
    },
    "llama-8b": known_fields("meta-llama/Llama-3.1-8B") or {},
}
#: Ways that others are compared with.
CAUSAL_BASES = (
    "frozen stock",
    "frozen fused",
    "PEFT LoRA, all logits",
    "PEFT LoRA",
    "PEFT Poly, all logits",
    "PEFT Poly",
)


def build_causal(setting: Setting) -> Any:
    """A frozen Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{"tie_word_embeddings": False, **CAUSAL_SHAPES[setting.model]})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(setting.dtype).to(setting.device)
    return model.train().requires_grad_(False)


def fuse_causal(model: Any, *names: str) -> Any:
    """The same weights with the named parts fused."""
    fused = same_weights(model)
    parts: dict[str, Any] = {f"fused_{name}": name in names for name in SWITCHES}
    CAUSAL.fuse(fused, BackboneConfig(name="x", **parts))
    return fused


def pack(setting: Setting) -> Packed:
    """Random tokens; every other prompt is shorter by a fifth."""
    random = np.random.default_rng(1)
    shape = CAUSAL_SHAPES[setting.model]
    top = shape["vocab_size"]
    rows = [
        EncodedRow(
            random.integers(3, top, setting.tokens - (row % 2 == 0) * (setting.tokens // 5)),
            (random.integers(3, top, setting.targets),),
            task=task,
        )
        for row, task in enumerate(setting.task_ids)
    ]
    packed = CAUSAL.pack(rows, CAUSAL.make_config({**shape, "model_type": "llama"}))
    return packed if setting.device == CPU else packed.to(setting.device)


def whole_rows(packed: Packed) -> dict[str, Tensor]:
    """The same rows as transformers' own loss wants them: ids, 2-D mask and labels (B, L + 1)."""
    ids, labels_BD = packed.inputs["input_ids"], packed.labels_BD
    whole = torch.cat((ids, labels_BD[:, -1:]), 1)
    labels = torch.full_like(whole, -100)
    labels[:, -labels_BD.shape[1] :] = labels_BD
    mask = (packed.inputs["branches"] >= 0).long()
    return {"input_ids": whole, "attention_mask": F.pad(mask, (0, 1), value=1), "labels": labels}


def plain_loss(logits_BDV: Tensor, labels_BD: Tensor) -> Tensor:
    """torch's own mean cross-entropy over float32 logits."""
    return F.cross_entropy(logits_BDV.float().flatten(0, 1), labels_BD.flatten())


def our_loss(model: Any, packed: Packed) -> Tensor:
    """The loss of a training step."""
    loss = language_model(CAUSAL.logits(model, packed), packed.labels_BD)
    return loss.sum.sum() / loss.count.sum()


def frozen(name: str, model: Any, packed: Packed, loss_of: Callable[[Any, Packed], Tensor]) -> Way:
    """The backbone alone; gradients pass through it to the embedded inputs."""
    found: list[Tensor] = []

    def catch(module: Any, inputs: Any, output: Tensor) -> Tensor:
        found[:] = [output.requires_grad_()]
        return output

    model.get_input_embeddings().register_forward_hook(catch)

    def clear() -> None:
        found[0].grad = None

    return Way(
        name=name,
        model=model,
        forward=lambda: loss_of(model, packed),
        backward=Tensor.backward,
        clear=clear,
    )


def peft(name: str, model: Any, setting: Setting, packed: Packed, *, at_targets: bool) -> Way:
    """Stock PEFT, its adapters in float32."""
    from peft import LoraConfig, PolyConfig, get_peft_model

    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 1, "target_modules": [*LINEARS]}
    batch: dict[str, Any] = {**whole_rows(packed), "use_cache": False}
    config: Any = LoraConfig(**options)
    if "Poly" in name:
        config = PolyConfig(**options, n_tasks=N_TASKS, n_skills=8, n_splits=8)
        batch["task_ids"] = torch.tensor(setting.task_ids, device=setting.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config).train()
    wrapped.to(setting.device)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    if not at_targets:
        return plain_way(name, wrapped, lambda: wrapped(**batch).loss, trained, setting)
    del batch["labels"]
    n_targets, length = packed.labels_BD.shape[1], packed.inputs["input_ids"].shape[1]
    batch["logits_to_keep"] = torch.arange(length - n_targets, length, device=setting.device)

    def forward() -> Tensor:
        return plain_loss(wrapped(**batch).logits, packed.labels_BD)

    return plain_way(name, wrapped, forward, trained, setting)


def causal_ways(model: Any, setting: Setting, names: Container[str] | None = None) -> list[Way]:
    """Every way, or those of these names, around the weights of one backbone."""
    packed = pack(setting)

    def bare() -> Any:
        return same_weights(model)

    def fused() -> Any:
        return fuse_causal(model, *SWITCHES)

    def stock_loss(one: Any, rows: Packed) -> Tensor:
        return plain_loss(CAUSAL.logits(one, rows), rows.labels_BD)

    def whole_loss(one: Any, rows: Packed) -> Tensor:
        loss: Tensor = one(**whole_rows(rows), use_cache=False).loss
        return loss

    def still(make: Callable[[], Any], loss_of: Callable[[Any, Packed], Tensor]) -> Maker:
        return lambda name: frozen(name, make(), packed, loss_of)

    def mine(make: Callable[[], Any], **options: Any) -> Maker:
        config = AdapterConfig(**{"n_skills": 8, "rank": 1, **options})
        return lambda name: ours(
            name, make(), setting, config, loss_of=lambda one: our_loss(one, packed)
        )

    def theirs(*, at_targets: bool) -> Maker:
        return lambda name: peft(name, bare(), setting, packed, at_targets=at_targets)

    makers: dict[str, Maker] = {
        "frozen stock": still(bare, stock_loss),
        "frozen stock, all logits": still(bare, whole_loss),
        "frozen fused": still(fused, our_loss),
        **{
            f"frozen, {one} alone": still(partial(fuse_causal, model, one), our_loss)
            for one in SWITCHES
        },
        "LoRA": mine(fused, n_skills=1),
        "Poly": mine(fused),
        "MHR 8": mine(fused, n_splits=8),
        "MHR 64": mine(fused, n_splits=64),
        "MHR 8, stock Llama": mine(bare, n_splits=8),
        "PEFT LoRA, all logits": theirs(at_targets=False),
        "PEFT LoRA": theirs(at_targets=True),
        "PEFT Poly, all logits": theirs(at_targets=False),
        "PEFT Poly": theirs(at_targets=True),
    }
    return made(makers, names)
