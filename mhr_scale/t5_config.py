"""A T5's configuration: read from a folder or a recipe, and found good."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mhr_scale.errors import BackboneError, did_you_mean, first_line

MODEL_TYPES = ("t5", "mt5")
#: Settings of T5Config that have to be at least 1.
SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")


def make_config(fields: dict[str, Any]) -> Any:
    """transformers' T5Config of a recipe's fields; raises `BackboneError` if no T5 has them."""
    from transformers import T5Config

    known = {field.name for field in dataclasses.fields(T5Config)}
    known |= {"tie_word_embeddings", "decoder_start_token_id"}
    for name in sorted(set(fields) - known):
        hint = did_you_mean(name, known)
        raise BackboneError(f"backbone.config: T5 has no setting '{name}'{hint}")
    try:
        model_config = T5Config(**fields)
    except Exception as error:
        raise BackboneError(f"backbone.config: {first_line(error)}") from error
    _check_config(model_config, "backbone.config")
    return model_config


def read_config(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A folder's configuration, as transformers reads it and as it is written.

    Raises `BackboneError` if it is none of a T5.
    """
    from transformers import AutoConfig

    raw = _read_raw(folder)
    if raw.get("model_type") not in MODEL_TYPES:
        raise BackboneError(
            f"{folder}: a backbone of type '{raw.get('model_type')}'; known: {MODEL_TYPES}"
        )
    try:
        model_config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise BackboneError(f"{folder / 'config.json'}: {first_line(error)}") from error
    _check_config(model_config, str(folder / "config.json"))
    if getattr(model_config, "decoder_start_token_id", None) is None:
        model_config.decoder_start_token_id = model_config.pad_token_id
    return model_config, raw


def _read_raw(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BackboneError(f"{file}: not a backbone folder ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise BackboneError(f"{file}:{error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise BackboneError(f"{file}: not UTF-8 text ({error.reason})") from error
    if not isinstance(raw, dict):
        raise BackboneError(f"{file}: a configuration is an object")
    return raw


def _check_config(model_config: Any, place: str) -> None:
    """Raise `BackboneError` for sizes and activations that no model can have."""
    from transformers.activations import ACT2FN

    for name in SIZES:
        if getattr(model_config, name) < 1:
            raise BackboneError(f"{place}: {name} {getattr(model_config, name)} is not at least 1")
    if not 0.0 <= model_config.dropout_rate < 1.0:
        raise BackboneError(f"{place}: dropout_rate {model_config.dropout_rate} is not in [0, 1)")
    if model_config.dense_act_fn not in ACT2FN:
        known = did_you_mean(model_config.dense_act_fn, ACT2FN)
        raise BackboneError(
            f"{place}: feed_forward_proj: no activation '{model_config.dense_act_fn}'{known}"
        )
