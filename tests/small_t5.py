"""Backbones of a few thousand weights, as folders of every format that is read."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.families.t5 import EMBEDDING_ALIASES

SIZES = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 384,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
CARD = {**SIZES, "model_type": "t5", "tie_word_embeddings": False}
HEAD = "lm_head.weight"
WO = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
INDICES = {
    "safetensors": "model.safetensors.index.json",
    "bin": "pytorch_model.bin.index.json",
}


def small_t5(*, tied: bool = False, **changes: Any) -> T5ForConditionalGeneration:
    """A model whose weights are large enough that each of them tells."""
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(T5Config(**{**SIZES, **changes}, tie_word_embeddings=tied))
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def tensors_of(model: nn.Module, *, aliases: bool = True) -> dict[str, Tensor]:
    """State of a model; with the copies of the embedding that old `.bin` files have."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {name: t for name, t in state.items() if aliases or name not in EMBEDDING_ALIASES}


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """A file of either format, by its suffix."""
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, each in one of them."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def write_folder(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    kind: str = "bin",
    shards: int = 1,
    card: dict[str, Any] = CARD,
) -> Path:
    """A backbone's folder: configuration, weights and, for several shards, their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(card))
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    if shards == 1:
        save(tensors, folder / f"{stem}.{kind}")
        return folder
    names, places = sorted(tensors), {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{kind}"
        part = names[number::shards]
        save({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / INDICES[kind]).write_text(json.dumps(index))
    return folder
