"""transformers' configurations: made of a recipe's fields or of a config.json, by model type."""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mhr_scale.errors import BackboneError, did_you_mean, first_line
from mhr_scale.families import composed

#: Fields of a configuration that say nothing of the model's computation.
OUTSIDE = frozenset({"architectures", "transformers_version", "torch_dtype", "dtype", "model_type"})
#: Settings that models or configurations read, but that no class of configurations lists.
UNLISTED = frozenset(
    {
        *("head_dim", "rope_theta", "rope_scaling", "partial_rotary_factor"),
        *("rotary_pct", "rotary_emb_base", "pad_token_id", "bos_token_id", "eos_token_id"),
    }
)


@lru_cache
def config_class(model_type: str) -> Any:
    """transformers' class of configurations of a model type."""
    from transformers import AutoConfig

    return type(AutoConfig.for_model(model_type))


def settings_of(model_type: str) -> set[str]:
    """What a configuration of this type may say of a model."""
    kind = config_class(model_type)
    listed = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    return (listed | UNLISTED) - OUTSIDE


def make_config(fields: Mapping[str, Any]) -> Any:
    """The configuration of a recipe's fields; raises `BackboneError` if no model has them."""
    model_type = fields["model_type"]
    if composed.is_composed(config_class(model_type)):
        raise BackboneError(
            f"backbone.config: a {model_type} is a text model with others; give the model_type "
            "and the settings of its text model"
        )
    given = {name: value for name, value in fields.items() if name not in OUTSIDE}
    known = settings_of(model_type)
    for name in sorted(set(given) - known):
        hint = did_you_mean(name, known)
        raise BackboneError(f"backbone.config: {model_type} has no setting '{name}'{hint}")
    try:
        return config_class(model_type)(**given)
    except Exception as error:
        raise BackboneError(f"backbone.config: {first_line(error)}") from error


def size_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config.json a model is made from."""
    known = settings_of(raw["model_type"]) | {"model_type"}
    return {name: value for name, value in raw.items() if name in known}


def read_config(raw: Mapping[str, Any]) -> Any:
    """The configuration that a config.json says; None if it says none."""
    try:
        return config_class(raw["model_type"]).from_dict(dict(raw))
    except Exception:
        return None
