"""Loading and checking the backbone's tokenizer."""

import hashlib
import json
from typing import Any

from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.hub import TOKENIZER_FILES, find_folder
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError, first_line
from mhr_scale.families.table import TOKENIZERS

#: Characters that hardly any vocabulary has.
UNSEEN = "\u16a0\ue000\U0001f9a4"


def load_tokenizer(config: BackboneConfig, blueprint: Blueprint) -> Any:
    """The backbone's tokenizer, or one that needs no files; no larger than the embeddings.

    Raises `BackboneError` if it cannot be read. Without its files transformers would return a
    tokenizer with an empty vocabulary, and no error.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer
    if name is None and blueprint.folder is None:
        name = blueprint.family.default_tokenizer
    if name in TOKENIZERS:
        tokenizer = TOKENIZERS[name]()
    else:
        folder = blueprint.folder
        if name is not None:
            folder = find_folder(name, None, setting="backbone.tokenizer", files=TOKENIZER_FILES)
        assert folder is not None
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise BackboneError(
                f"{folder}: no readable tokenizer ({first_line(error)}); set backbone.tokenizer"
            ) from error
        vocab_files = sorted(set(tokenizer.vocab_files_names.values()))
        if vocab_files and not any((folder / file).is_file() for file in vocab_files):
            raise BackboneError(
                f"{folder}: no tokenizer here ({' or '.join(vocab_files)}); set backbone.tokenizer"
            )
    is_own = name is None
    place = f"{blueprint.folder}: its tokenizer" if is_own else "backbone.tokenizer:"
    way_out = "set backbone.tokenizer" if is_own else "choose the backbone's own tokenizer"
    _check_tokenizer(tokenizer, blueprint.model_config.vocab_size, place=place, way_out=way_out)
    return tokenizer


def _check_tokenizer(tokenizer: Any, vocab_size: int, *, place: str, way_out: str) -> None:
    """Raise `BackboneError` if special tokens are missing, or ids exceed the embeddings."""
    for token in ("pad_token", "eos_token"):
        if getattr(tokenizer, token) is None:
            raise BackboneError(f"{place} has no {token}; {way_out}")
    n_pieces = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if n_pieces > vocab_size:
        verb = " has" if place.endswith("tokenizer") else ""
        raise BackboneError(
            f"{place}{verb} {n_pieces} pieces, the backbone embeds only {vocab_size}; {way_out}"
        )
    try:
        tokenizer(["a text", UNSEEN], add_special_tokens=False)
    except Exception as error:
        raise BackboneError(
            f"{place} cannot read every text ({first_line(error)}); {way_out}"
        ) from error


def hash_tokenizer(tokenizer: Any) -> str:
    """What tells tokenizers apart by content."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        text = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    return hashlib.sha256(f"{text}{tokenizer.eos_token_id}".encode()).hexdigest()
