"""A T5's configuration: read from a folder or a recipe, and found good."""

import dataclasses
from pathlib import Path
from typing import Any

from mhr_scale.errors import BackboneError, did_you_mean, first_line
from mhr_scale.run.files import read_object

MODEL_TYPES = ("t5", "mt5")
#: Settings of T5Config that have to be at least 1, and the largest that any T5 could have.
SIZES = {
    "vocab_size": 1 << 24,
    "d_model": 1 << 20,
    "d_kv": 1 << 20,
    "d_ff": 1 << 20,
    "num_layers": 1000,
    "num_decoder_layers": 1000,
    "num_heads": 1 << 16,
    "relative_attention_num_buckets": 1 << 16,
    "relative_attention_max_distance": 1 << 24,
}


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
        known = ", ".join(MODEL_TYPES)
        raise BackboneError(
            f"{folder}: a backbone of type '{raw.get('model_type')}'; known: {known}"
        )
    try:
        model_config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise BackboneError(f"{folder / 'config.json'}: {first_line(error)}") from error
    _check_config(model_config, str(folder / "config.json"))
    if getattr(model_config, "decoder_start_token_id", None) is None:
        model_config.decoder_start_token_id = model_config.pad_token_id
    return model_config, raw


def _check_attention(model_config: Any, place: str) -> None:
    """Raise `BackboneError` for buckets of distances that T5's logarithm is not defined for."""
    buckets = model_config.relative_attention_num_buckets
    distance = model_config.relative_attention_max_distance
    if buckets < 4 or distance <= buckets // 2:
        raise BackboneError(
            f"{place}: relative_attention_num_buckets {buckets} is below 4, or no less than twice "
            f"relative_attention_max_distance {distance}"
        )
    for name in ("layer_norm_epsilon", "initializer_factor"):
        value = getattr(model_config, name)
        if not (isinstance(value, int | float) and 0.0 <= value < float("inf")):
            raise BackboneError(f"{place}: {name} {value} is not a number from 0")


def _read_raw(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise BackboneError(f"{folder}: not a backbone folder (no {file.name} here)")
    return read_object(file, BackboneError)


def _check_config(model_config: Any, place: str) -> None:
    """Raise `BackboneError` for sizes and activations that no model can have."""
    from transformers.activations import ACT2FN

    for name, largest in SIZES.items():
        size = getattr(model_config, name)
        if not isinstance(size, int) or not 1 <= size <= largest:
            is_small = isinstance(size, int) and size < 1
            bound = "at least 1" if is_small else f"a whole number in 1..{largest}"
            raise BackboneError(f"{place}: {name} {size} is not {bound}")
    _check_attention(model_config, place)
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        token = getattr(model_config, name, None)
        is_token = isinstance(token, int) and 0 <= token < model_config.vocab_size
        if token is not None and not is_token:
            raise BackboneError(
                f"{place}: {name} {token} is not in 0..{model_config.vocab_size - 1}"
            )
    if not 0.0 <= model_config.dropout_rate < 1.0:
        raise BackboneError(f"{place}: dropout_rate {model_config.dropout_rate} is not in [0, 1)")
    if model_config.dense_act_fn not in ACT2FN:
        known = did_you_mean(model_config.dense_act_fn, ACT2FN)
        raise BackboneError(
            f"{place}: feed_forward_proj: no activation '{model_config.dense_act_fn}'{known}"
        )
