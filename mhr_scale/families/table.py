"""The table of backbone families, and the family that a backbone, or a linear's name, belongs to.

A new family is one object here.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhr_scale.errors import BackboneError, LayoutError, first_line, shortened
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.family import Family
from mhr_scale.families.known_sizes import KNOWN
from mhr_scale.families.t5 import GATED, UNGATED, make_byte_tokenizer
from mhr_scale.families.t5gemma import T5GEMMA
from mhr_scale.run.files import read_object

FAMILIES: tuple[Family, ...] = (GATED, UNGATED, CAUSAL, T5GEMMA)
#: Tokenizers that need no files, by what a recipe calls them.
TOKENIZERS: dict[str | None, Callable[[], Any]] = {"byt5": make_byte_tokenizer}
#: Settings of a config.json: the classes of code beside it, and how its weights were quantised.
CODE, QUANTISED = "auto_map", "quantization_config"
#: What a folder says of generation, of which the ends of sequence are read.
GENERATION = "generation_config.json"
#: Settings that change what a model returns or by which kernels, not what it computes.
PLAIN: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "_attn_implementation": None,
}
#: The model type of a recipe's fields that do not say one.
DEFAULT_TYPE = "t5"


def _known_types() -> str:
    return ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.list_types()))


def find_family(config: Any) -> Family:
    """The family of a model's configuration; raises `LayoutError` for an unknown one."""
    for family in FAMILIES:
        if family.matches(config):
            return family
    raise LayoutError(
        f"no layout for backbones of type '{config.model_type}'; known types: {_known_types()} and "
        "other causal language models of transformers (a new family is one object in "
        "mhr_scale/families/table.py)"
    )


def make_config(given: Mapping[str, Any]) -> tuple[Family, Any, dict[str, Any]]:
    """Family and configuration of a recipe's fields, and the fields with what they leave out.

    Raises `BackboneError` if no model has them.
    """
    model_type = given.get("model_type", DEFAULT_TYPE)
    if not _is_known(model_type):
        raise BackboneError(
            f"backbone.config: model_type '{model_type}' is of no family; known: {_known_types()}"
        )
    family = _of_type(model_type)
    fields = {**family.default_fields, **given}
    _check_tie(fields, "backbone.config")
    config = family.make_config(fields)
    family.check_config(config, "backbone.config")
    complete(config, family)
    return find_family(config), config, fields


def read_config(folder: Path) -> tuple[Family, Any, dict[str, Any]]:
    """Family and configuration of a folder, as transformers reads it and as it is written.

    Raises `BackboneError` if it is none of a known family.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise BackboneError(f"{folder}: not a backbone folder (no {file.name} here)")
    raw: dict[str, Any] = read_object(file, BackboneError)
    if not _is_known(raw.get("model_type")):
        raise BackboneError(
            f"{folder}: a backbone of type '{raw.get('model_type')}'; use one of type "
            f"{_known_types()}, another causal language model of transformers, or add its family "
            "(one object in mhr_scale/families/table.py)"
        )
    refuse_code(raw, file, "AutoConfig", "AutoModel")
    _check_tie(raw, str(file))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise BackboneError(f"{file}: {first_line(error)}") from error
    family = _of_type(raw["model_type"])
    config = family.own_config(config, str(file))
    family.check_config(config, str(file))
    complete(config, family)
    generation = folder / GENERATION
    if generation.is_file():
        family.set_ends(config, read_object(generation, BackboneError), str(generation))
    if hasattr(config, QUANTISED):  # of no use: weights are floats, or refused when they are read
        delattr(config, QUANTISED)
    for name, value in PLAIN.items():
        setattr(config, name, value)
    return find_family(config), config, raw


def refuse_code(raw: Mapping[str, Any], file: Path, *kinds: str) -> None:
    """Raise `BackboneError` if a file has classes of these kinds come from code beside it."""
    asked = raw.get(CODE) or {}
    if not isinstance(asked, dict) or any(name.startswith(kinds) for name in asked):
        raise BackboneError(
            f"{file}: {CODE} asks for code of its own ({shortened(json.dumps(asked))}), which is "
            f"never run; if transformers' own classes do the same, remove {CODE}"
        )


def _check_tie(raw: Mapping[str, Any], place: str) -> None:
    """Raise `BackboneError` if what is said of ties is no answer: transformers would read a yes."""
    said = raw.get("tie_word_embeddings")
    if not (said is None or isinstance(said, bool)):
        raise BackboneError(f"{place}: tie_word_embeddings {said!r} is neither true nor false")


def complete(config: Any, family: Family) -> None:
    """Set what a configuration leaves out and a model needs."""
    for name, value in family.required_fields(config).items():
        setattr(config, name, value)


def _is_known(model_type: Any) -> bool:
    return isinstance(model_type, str) and any(family.knows(model_type) for family in FAMILIES)


def _of_type(model_type: str) -> Family:
    """The first family of a model type: what it says of configurations holds for all of them."""
    return next(family for family in FAMILIES if family.knows(model_type))


def known_fields(name: str) -> dict[str, Any] | None:
    """Fields of the configuration of a hub id whose sizes are known; None if they are not."""
    return KNOWN.get(name)


def family_of_linears(names: Iterable[str], raw: Mapping[str, Any] | None = None) -> Family:
    """The family that knows most of these linears; of several the one of a known config.json."""
    names = tuple(names)
    return max(
        FAMILIES,
        key=lambda family: (
            sum(family.find_position(name) is not None for name in names),
            raw is not None and family.is_of(raw),
        ),
    )


def find_prefix(name: str) -> int | None:
    """Where, in a name that another program has prefixed, the name of a known linear begins."""
    places = (family.find_prefix(name) for family in FAMILIES)
    return next((place for place in places if place is not None), None)


def shorten(names: Sequence[str]) -> list[str]:
    """Names of linears or routing groups, as short as a picture wants them, none the same."""
    pairs = dict.fromkeys(pair for family in FAMILIES for pair in family.abbreviations)
    made = []
    for name in names:
        for pattern, brief in pairs:
            name = re.sub(pattern, brief, name)
        made.append(name)
    return made if len(set(made)) == len(set(names)) else list(names)
