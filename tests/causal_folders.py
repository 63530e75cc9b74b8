"""Folders of small causal language models as the hub has them, and what is made of them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from small_causal import FAMILIES, enlarge, packed_logits, small_causal
from torch import Tensor

from mhr_scale.adapters import Adapter, AdapterConfig
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.of_adapter import find_sites_of
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import place

#: Vision-language models: the family of their text model, its type, and the rest of the fields.
SEEING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("gemma3", "gemma3_text", {"mm_tokens_per_image": 4}),
    "mistral3": ("mistral", "mistral", {"vision_feature_layer": -1, "tie_word_embeddings": False}),
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def small_seeing(kind: str) -> Any:
    """A vision-language model whose parts are small."""
    family, text, fields = SEEING[kind]
    vision = {"gemma3": "siglip_vision_model"}.get(kind, "pixtral")
    config = transformers.AutoConfig.for_model(
        kind,
        text_config={**FAMILIES[family][1], "model_type": text},
        vision_config={**VISION, "model_type": vision},
        **fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return enlarge(transformers.AutoModelForImageTextToText.from_config(config))


def write_causal(folder: Path, family: str, **changes: Any) -> Path:
    """A model's folder, as transformers writes it: by the names that the hub has."""
    small_causal(family, **changes).save_pretrained(folder)
    return folder


def adapter_gradients(engine: Engine, folder: Path, recompute: Any) -> tuple[list[Tensor], int]:
    """Of the tensors of an MHR adapter on attention, and how often the first attention ran."""
    config = BackboneConfig(name=str(folder), dtype="float32", recompute=recompute)
    blueprint = read_blueprint(config)
    settings = AdapterConfig(n_skills=2, n_splits=2, layout="attention")
    sites = find_sites_of(blueprint, settings)
    adapter = Adapter(settings, sites, task_names=("a", "b", "c"))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    placed = place(engine, config, blueprint, sites)
    adapter.bind(placed.adapted)
    placed.model.train()
    calls: list[None] = []
    attention = placed.model.get_submodule(sites[0].name.rpartition(".")[0])
    attention.register_forward_hook(lambda *_: calls.append(None))
    with adapter.slots([0, 1, 2]) as slots:
        logits = packed_logits(placed.model, placed.family, gradient=True)
        slots.backward(torch.stack([one.logsumexp(-1).sum() for one in logits]).sum())
    engine.after_backward()
    return [p.grad for p in adapter.parameters() if p.grad is not None], len(calls)
