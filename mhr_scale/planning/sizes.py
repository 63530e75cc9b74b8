"""A backbone's sizes without its weights: from a table of known ones, or its config.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mhr_scale.backbone import hub
from mhr_scale.backbone.blueprint import Blueprint, read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.families import t5_config
from mhr_scale.families.t5_config import SIZES
from mhr_scale.run.runlog import log

#: What of a config.json is read.
FIELDS = (
    *SIZES,
    "feed_forward_proj",
    "dropout_rate",
    "tie_word_embeddings",
    "pad_token_id",
    "decoder_start_token_id",
)
_V1_1 = {
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "vocab_size": 32128,
    "d_kv": 64,
}


def _sizes(d_model: int, d_ff: int, heads: int, layers: int) -> dict[str, Any]:
    return {**_V1_1, "d_model": d_model, "d_ff": d_ff, "num_heads": heads, "num_layers": layers}


#: T5 v1.1 by size: what LM-adapt, T0 and FLAN are too.
_T5 = {
    "small": _sizes(512, 1024, 6, 8),
    "base": _sizes(768, 2048, 12, 12),
    "large": _sizes(1024, 2816, 16, 24),
    "xl": _sizes(2048, 5120, 32, 24),
    "xxl": _sizes(4096, 10240, 64, 24),
}
#: Fields of T5Config by hub id: known ones need no hub.
KNOWN = {
    **{f"google/t5-v1_1-{size}": fields for size, fields in _T5.items()},
    **{f"google/t5-{size}-lm-adapt": fields for size, fields in _T5.items()},
    **{f"google/flan-t5-{size}": fields for size, fields in _T5.items()},
    **{f"bigscience/{name}": _T5["xxl"] for name in ("T0", "T0p", "T0pp")},
    "bigscience/T0_3B": _T5["xl"],
}


def read_sizes(config: BackboneConfig) -> Blueprint:
    """A blueprint to draw models from, of which no weight is looked at.

    Raises `BackboneError` if the backbone is neither found nor in the table.
    """
    if config.name is None:
        return read_blueprint(config)
    if config.name in KNOWN and not Path(config.name).is_dir():
        log.info("%s: sizes from the table of known backbones", config.name)
        fields = KNOWN[config.name]
    else:
        try:
            folder = hub.find_folder(config.name, config.revision, files=("config.json",))
        except BackboneError as error:
            raise BackboneError(
                f"{error}; or put its T5Config under backbone.config and set backbone.name=null"
            ) from error
        _, raw = t5_config.read_config(folder)
        fields = {name: raw[name] for name in FIELDS if raw.get(name) is not None}
    return read_blueprint(replace(config, name=None, config=fields))
