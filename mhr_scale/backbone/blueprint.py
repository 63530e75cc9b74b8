"""The frozen backbone: where its weights come from, which of them are one tensor, its tokenizer.

Nothing here knows about ranks or shards: `engine.py` asks a `WeightSource` for the range of each
tensor that it needs. The loader is our own because transformers ties an untied `lm_head` to the
embeddings without a word when it loads under ZeRO-3 (T0, T5 v1.1, FLAN): ties are decided here,
from the names in the checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhr_scale.backbone.hub import find_folder
from mhr_scale.backbone.manifest import Manifest, check_files, check_weights, read_manifest
from mhr_scale.backbone.weights import PickledSource, RandomSource, WeightSource, open_weights
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.families.t5_config import make_config, read_config

#: Names that are the embedding by definition of the architecture.
EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """Everything needed to build one backbone: configuration, weights and where they are from."""

    model_class: Any
    model_config: Any
    source: WeightSource
    is_lm_head_tied: bool
    folder: Path | None
    facts: dict[str, Any]
    manifest: Manifest | None = None


def read_blueprint(config: BackboneConfig) -> Blueprint:
    """Find the backbone; raises `BackboneError` if it cannot be found, read or trusted."""
    if config.name is None:
        return _random_blueprint(config)
    folder = find_folder(config.name, config.revision)
    model_config, raw = read_config(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        check_files(folder, manifest)
    source = open_weights(folder)
    if manifest is None:
        tied = _is_tied(source, says_tied=raw.get("tie_word_embeddings", True) is not False)
    else:
        check_weights(folder, manifest, source)
        tied = HEAD in manifest.tied
    facts: dict[str, Any] = {
        "name": config.name,
        "revision": config.revision,
        "folder": folder.name,
    }
    if manifest is not None:
        facts["converted_from"] = manifest.source
    return Blueprint(
        model_class=_model_class(raw["model_type"]),
        model_config=model_config,
        source=source,
        is_lm_head_tied=tied,
        folder=folder,
        facts=facts,
        manifest=manifest,
    )


def _random_blueprint(config: BackboneConfig) -> Blueprint:
    """A backbone of the recipe's own configuration, with random weights."""
    assert config.config is not None
    fields = {"decoder_start_token_id": 0, **config.config}
    model_config = make_config(fields)
    tied = fields.get("tie_word_embeddings", True) is not False
    shapes = _shapes(model_config, tied=tied)
    return Blueprint(
        model_class=_model_class("t5"),
        model_config=model_config,
        source=RandomSource(model_config, shapes, config.config_seed),
        is_lm_head_tied=tied,
        folder=None,
        facts={"name": None, "config": dict(fields), "config_seed": config.config_seed},
    )


def make_model(blueprint: Blueprint) -> nn.Module:
    """Build the model without filling its weights, on whatever device the context says.

    Ties are made as the checkpoint has them; the model is frozen and in evaluation mode.
    """
    from transformers import initialization as hf_init

    with hf_init.no_init_weights(), hf_init.no_tie_weights():
        model: nn.Module = blueprint.model_class(blueprint.model_config)
    tie(model, blueprint)
    model.requires_grad_(False)
    return model.eval()


def tie(model: Any, blueprint: Blueprint) -> None:
    """Make the tied parameters one, and leave an untied `lm_head` alone."""
    model.encoder.embed_tokens.weight = model.shared.weight
    model.decoder.embed_tokens.weight = model.shared.weight
    if blueprint.is_lm_head_tied:
        model.lm_head.weight = model.shared.weight
    model.config.tie_word_embeddings = blueprint.is_lm_head_tied


def plan_copies(model: nn.Module, source: WeightSource) -> dict[str, nn.Parameter]:
    """Map each name to be read to the parameter it fills, every parameter exactly once.

    Raises `BackboneError` listing missing, unknown or mis-shaped tensors. A ZeRO-3 parameter's
    whole shape is its `ds_shape`.
    """
    parameters = dict(model.named_parameters())
    known = set(EMBEDDING_ALIASES) | {EMBEDDING, HEAD}
    names = source.names()
    faults = [f"missing {name}" for name in sorted(parameters.keys() - names)]
    faults += [
        f"unknown {name}"
        for name in sorted(names - parameters.keys() - known)
        if not ("EncDecAttention" in name and name.endswith(".relative_attention_bias.weight"))
    ]
    for name in sorted(parameters.keys() & names):
        parameter = parameters[name]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != source.shape(name):
            faults.append(f"{name} is {list(source.shape(name))}, the model wants {list(shape)}")
    if faults:
        files = [file for file in map(source.file, sorted(names)) if file is not None]
        place = f"{files[0].parent}: " if files else ""
        raise BackboneError(
            f"{place}the checkpoint does not fit its configuration, {len(faults)} fault(s): "
            f"{'; '.join(faults[:5])}; fetch both again"
        )
    return parameters


def _model_class(model_type: str) -> Any:
    """The model class of a type, imported here: not where parameters are being sharded."""
    from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

    return {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration}[model_type]


def _shapes(model_config: Any, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, built on the meta device."""
    blueprint = Blueprint(
        model_class=_model_class("t5"),
        model_config=model_config,
        source=PickledSource([]),
        is_lm_head_tied=tied,
        folder=None,
        facts={},
    )
    with torch.device("meta"):
        model = make_model(blueprint)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def tied_names(blueprint: Blueprint) -> dict[str, str]:
    """Names that a checkpoint may give the embedding besides its own."""
    aliases = (*EMBEDDING_ALIASES, *((HEAD,) if blueprint.is_lm_head_tied else ()))
    return dict.fromkeys(aliases, EMBEDDING)


def _is_tied(source: WeightSource, *, says_tied: bool) -> bool:
    """Whether `lm_head` is the embedding: absent, or said to be and equal to it."""
    if HEAD not in source.names():
        return True
    return says_tied and EMBEDDING in source.names() and is_equal(source, HEAD, EMBEDDING)


def is_equal(source: WeightSource, name: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are the same, bit for bit; a part is read at a time."""
    shape = source.shape(name)
    if shape != source.shape(other) or len(shape) != 2:
        return False
    step = max(1, shape[1]) * 1024
    total = shape[0] * shape[1]
    return all(
        torch.equal(
            source.read(name, start, min(start + step, total)),
            source.read(other, start, min(start + step, total)),
        )
        for start in range(0, total, step)
    )
