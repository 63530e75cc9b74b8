"""Loading and checking the backbone's tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.hub import TOKENIZER_FILES, find_folder
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError, first_line
from mhr_scale.families.table import TOKENIZERS, refuse_code
from mhr_scale.run.files import read_object
from mhr_scale.run.runlog import log

#: Characters that hardly any vocabulary has.
UNSEEN = "\u16a0\ue000\U0001f9a4"
#: Texts in which readings of a sentencepiece file differ: by words in pieces, and by spaces.
WORDS = "the question is which of these 3.5 % are (un)believable, and why there were no others"
SPACES = "two  spaces,\ttabs "


def load_tokenizer(config: BackboneConfig, blueprint: Blueprint) -> Any:
    """The backbone's tokenizer, or one that needs no files; its ids are those of the backbone.

    Raises `BackboneError` if it cannot be read, or asks for code of its own.
    """
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
        tokenizer = _read(folder)
    is_own = name is None
    place = f"{blueprint.folder}: its tokenizer" if is_own else "backbone.tokenizer:"
    way_out = "set backbone.tokenizer" if is_own else "choose the backbone's own tokenizer"
    _check_tokenizer(tokenizer, blueprint, place=place, way_out=way_out)
    return tokenizer


def _read(folder: Path) -> Any:
    """The tokenizer of a folder, as transformers reads it; never by code that lies there.

    Without its files transformers would return one with an empty vocabulary, and no error.
    """
    from transformers import AutoTokenizer
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    for file in (folder / "tokenizer_config.json", folder / "config.json"):
        if file.is_file():
            refuse_code(read_object(file, BackboneError), file, "AutoTokenizer")
    pieces = sorted(folder.glob("*.model"))
    if pieces and not (folder / "tokenizer.json").is_file():
        available = {
            "sentencepiece": is_sentencepiece_available(),
            "protobuf": is_protobuf_available(),
        }
        missing = " ".join(package for package, is_there in available.items() if not is_there)
        if missing:
            raise BackboneError(
                f"{pieces[0]}: cannot be read without {missing}; pip install {missing}"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise BackboneError(
            f"{folder}: no readable tokenizer ({first_line(error)}); set backbone.tokenizer"
        ) from error
    vocab_files = sorted(set(tokenizer.vocab_files_names.values()))
    if vocab_files and not any((folder / file).is_file() for file in vocab_files):
        raise BackboneError(
            f"{folder}: no tokenizer here ({' or '.join(vocab_files)}); set backbone.tokenizer"
        )
    used = [file for file in pieces if file.name in vocab_files]
    if used and not (folder / "tokenizer.json").is_file():
        _check_pieces(tokenizer, used[0])
    return tokenizer


def _check_pieces(tokenizer: Any, file: Path) -> None:
    """Raise `BackboneError` if tokens are others than those of the library that wrote the file.

    transformers takes for granted what T5's own file is: unigram pieces, the unknown one third.
    """
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in (WORDS, SPACES, UNSEEN):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = original.encode(text)
        if found == expected:
            continue
        if text == SPACES:
            log.warning("%s: spaces in a row, or at the end, are read as other tokens", file)
        elif original.unk_id() in found and any(map(original.is_byte, expected)):
            log.warning("%s: unknown characters are read as one token, not as their bytes", file)
        else:
            raise BackboneError(
                f"{file}: transformers makes other tokens of {text!r} than sentencepiece does; put "
                "a right tokenizer.json beside it, or set backbone.tokenizer"
            )


def _check_tokenizer(tokenizer: Any, blueprint: Blueprint, *, place: str, way_out: str) -> None:
    """Raise `BackboneError` if special tokens are missing or others than the backbone's.

    Also if ids exceed the embeddings.
    """
    config, verb = blueprint.model_config, " has" if place.endswith("tokenizer") else ""
    for token in ("pad_token", "eos_token"):
        if getattr(tokenizer, token) is None:
            raise BackboneError(f"{place} has no {token}; {way_out}")
    n_pieces = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if n_pieces > config.vocab_size:
        raise BackboneError(
            f"{place}{verb} {n_pieces} pieces, the backbone embeds only {config.vocab_size}; "
            f"{way_out}"
        )
    for name in ("pad_token_id", "eos_token_id"):
        own, wanted = getattr(tokenizer, name), getattr(config, name)
        if own != wanted:
            file = f"{blueprint.folder}/config.json" if blueprint.folder else "backbone.config"
            raise BackboneError(
                f"{place}{verb} {name} {own}, {file} says {wanted}; correct the one that is wrong, "
                f"or {way_out}"
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
