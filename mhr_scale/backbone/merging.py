"""The merged backbone: an adapter added into the weights, written as safetensors shards.

Shape letters: I in features, O out features, R rank.

Weights are read tensor by tensor from the backbone's source, whatever placement the adapter was
trained in; memory holds one at a time, in float32 where it is added to.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.backbone.arranged import ArrangedSource
from mhr_scale.backbone.blueprint import Blueprint, make_model, plan_copies
from mhr_scale.backbone.shards import (
    Weight,
    name_shard,
    plan_shards,
    write_index,
    write_shard,
)
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.backbone.weights import SafetensorsSource, read_whole
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.families.linear_modules import is_transposed
from mhr_scale.families.table import QUANTISED
from mhr_scale.run.files import write_json
from mhr_scale.run.runlog import ByteProgress

#: Files of a backbone folder that belong to a merged one too.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "*.model",
)


def plan_weights(blueprint: Blueprint, dtype: str | None) -> list[Weight]:
    """The tensors of a merged backbone in the model's order, tied ones once; no weight is read.

    Raises `BackboneError` if the weights do not fit their configuration.
    """
    with torch.device("meta"):
        model = make_model(blueprint)
    return [
        Weight(
            name=name,
            shape=tuple(parameter.shape),
            dtype=getattr(torch, dtype) if dtype else blueprint.source.dtype(name),
        )
        for name, parameter in plan_copies(model, blueprint).items()
    ]


def as_stored(blueprint: Blueprint, weights: Sequence[Weight]) -> dict[Weight, tuple[Weight, int]]:
    """The tensors of the files to write, each with its weight and where in that it begins.

    Files call and cut them as the original's do where that is usual: experts lie apart.
    """
    source, found = blueprint.source, {}
    for weight in weights:
        parts: Mapping[str, tuple[int, ...]] = {weight.name: weight.shape}
        if isinstance(source, ArrangedSource) and blueprint.arrangement.is_usual:
            parts = source.parts(weight.name)
        start = 0
        for name, shape in parts.items():
            part = replace(weight, name=name, shape=shape)
            found[part] = weight, start
            start += part.numel
    return found


def merge(name: str, weight_OI: Tensor, pairs: Mapping[str, Tensor], *, scale: float) -> Tensor:
    """The weight `name` with what a single adapter stores for it added in, in float32.

    W + scale * (A B)^T, or the rows of W scaled by an (IA)3 vector, and so its bias (O,); other
    weights as they are.
    """
    linear, _, part = name.rpartition(".")
    if f"{linear}.l" in pairs:
        factors_O = pairs[f"{linear}.l"].float().flatten()
        return weight_OI.float() * (factors_O if part == "bias" else factors_O[:, None])
    if part != "weight":
        return weight_OI
    if f"{linear}.A" in pairs:
        a_IR, b_RO = (pairs[f"{linear}.{side}"][0, 0].float() for side in "AB")
        return weight_OI.float() + (a_IR @ (b_RO * scale)).T
    return weight_OI


def merging_of(adapter: Adapter, blueprint: Blueprint) -> Callable[[str, Tensor], Tensor]:
    """What a weight becomes with a single adapter merged in; a transposed one stays so."""
    pairs, scale = artefact.named_tensors(adapter), adapter.config.scale
    with torch.device("meta"):
        modules = make_model(blueprint).named_modules()
    transposed = {f"{name}.weight" for name, module in modules if is_transposed(module)}

    def merged(name: str, weight: Tensor) -> Tensor:
        if name in transposed:
            return merge(name, weight.T, pairs, scale=scale).T
        return merge(name, weight, pairs, scale=scale)

    return merged


@torch.no_grad()
def write_merged(
    adapter: Adapter,
    folder: Path,
    *,
    blueprint: Blueprint,
    weights: Sequence[Weight],
    max_shard_bytes: int,
) -> None:
    """Write the weights of `blueprint` with a single adapter merged in; each is rounded once.

    Memory holds one tensor at a time. Raises `OSError` if a file cannot be written.
    """
    sum_of, parts = merging_of(adapter, blueprint), as_stored(blueprint, weights)
    shards = plan_shards(list(parts), max_shard_bytes)
    progress = ByteProgress(sum(weight.n_bytes for weight in weights), what="merge")

    @lru_cache(maxsize=1)
    def merged(weight: Weight) -> Tensor:
        stored = read_whole(blueprint.source, weight.name)
        return sum_of(weight.name, stored).to(weight.dtype).contiguous().view(-1)

    def read(part: Weight, start: int, stop: int) -> Tensor:
        weight, first = parts[part]
        return merged(weight)[first + start : first + stop]

    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = name_shard(number, len(shards)) if len(shards) > 1 else "model.safetensors"
        widest_first = sorted(shard, key=lambda weight: -weight.dtype.itemsize)
        write_shard(folder / file, widest_first, read, advance=progress.add)
        places |= dict.fromkeys((weight.name for weight in shard), file)
    progress.close()
    if len(shards) > 1:
        write_index(folder, list(parts), places)


def write_companions(
    folder: Path,
    *,
    blueprint: Blueprint,
    settings: BackboneConfig,
    weights: Sequence[Weight],
    quantised: Mapping[str, Any] | None = None,
) -> None:
    """Write the configuration, generation settings and tokenizer beside merged weights.

    The configuration is the backbone's own: its `tie_word_embeddings` says whether logits are
    scaled, and the names of the weights say whether embeddings are tied. `quantised` is what it
    says of quantised linears.
    """
    family, model_config = blueprint.family, blueprint.model_config
    raw = family.own_fields(blueprint.raw)
    raw["architectures"] = [family.model_class(model_config).__name__]
    for name, value in family.required_fields(model_config).items():
        if raw.get(name) is None:
            raw[name] = value
    for name in ("dtype", QUANTISED):
        raw.pop(name, None)
    largest = max(weights, key=lambda weight: weight.n_bytes)
    raw["torch_dtype"] = str(largest.dtype).removeprefix("torch.")
    if quantised:
        raw[QUANTISED] = dict(quantised)
    write_json(folder / "config.json", raw)
    if settings.tokenizer or blueprint.folder is None:
        load_tokenizer(settings, blueprint).save_pretrained(folder)
    if blueprint.folder is not None:
        for pattern in COMPANIONS:
            for file in sorted(blueprint.folder.glob(pattern)):
                if not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)


def with_weights(blueprint: Blueprint, file: Path) -> Blueprint:
    """The same backbone with the weights in `file`, which a job of kind backbone trained."""
    if not file.is_file():
        raise BackboneError(f"{file}: missing, though the job trained it; copy the folder whole")
    return replace(blueprint, source=SafetensorsSource([file]), manifest=None)
