"""Text models inside models of several kinds: of a vision-language model the text model is used.

Its configuration stands under `text_config`; its weights lie among those of the whole model, whose
names transformers maps.
"""

import copy
from collections.abc import Iterable
from typing import Any

from mhr_scale.errors import BackboneError, first_line
from mhr_scale.families.stored_names import Stored, map_names

#: Settings of the whole that hold for its text model too.
SHARED = ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")


def knows(model_type: str) -> bool:
    """Whether transformers has a model of this type that reads texts and pictures."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def is_composed(config: Any) -> bool:
    """Whether a configuration is one of several models, one of which reads texts."""
    return "text_config" in getattr(config, "sub_configs", {})


def text_config(config: Any, place: str) -> Any:
    """The configuration of the text model; raises `BackboneError` if there is none."""
    try:
        text = copy.deepcopy(config.get_text_config(decoder=True))
    except Exception as error:
        raise BackboneError(f"{place}: {first_line(error)}") from error
    for name in SHARED:
        value = getattr(config, name, None)
        if value is not None:
            setattr(text, name, value)
    return text


def arrange(
    config: Any, text_model: Any, names: Iterable[str]
) -> tuple[dict[str, Stored], frozenset[str]]:
    """What the tensors of the text model are in a checkpoint of the whole, and all other names."""
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel, initialization

    with (
        torch.device("meta"),
        initialization.no_init_weights(),
        initialization.no_tie_weights(),
    ):
        whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](copy.deepcopy(config))
    kind = type(config.get_text_config(decoder=True))
    place = next(
        name
        for name, module in whole.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is kind
    )
    known, prefix = text_model.state_dict().keys(), text_model.base_model_prefix
    stored: dict[str, Stored] = {}
    unused: set[str] = set()
    for name, parts in map_names(whole, names).items():
        is_inside = name.startswith(f"{place}.")
        own = f"{prefix}{name.removeprefix(place)}" if is_inside else name
        if is_inside or own in known:
            stored[own] = parts
        else:
            unused.update(parts.names)
    return stored, frozenset(unused)
