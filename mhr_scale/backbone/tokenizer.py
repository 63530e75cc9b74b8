"""Loading and checking the backbone's tokenizer."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.hub import TOKENIZER_FILES, find_folder
from mhr_scale.backbone.sample_texts import make_texts
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError, first_line, shortened
from mhr_scale.families.table import TOKENIZERS, refuse_code
from mhr_scale.run.files import read_object, write_text
from mhr_scale.run.runlog import log

#: Characters that hardly any vocabulary has.
UNSEEN = "\u16a0\ue000\U0001f9a4"
#: A tokenizer in the form that takes no sentencepiece; it is read before a sentencepiece file.
FAST = "tokenizer.json"


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


def write_fast(source: Path, folder: Path) -> None:
    """Write `tokenizer.json` for a tokenizer that `source` has as a sentencepiece file alone.

    `folder` holds copies of its other files, which stay as they are: older versions of transformers
    read their own settings only. Raises `BackboneError` if transformers reads other tokens than
    sentencepiece, or with `tokenizer.json` others than without.
    """
    if not _slow_files(source):
        return
    way_out = "move its sentencepiece file away to convert the weights alone"
    tokenizer = _read(source, way_out=way_out)
    if not tokenizer.is_fast:  # it reads bytes: the sentencepiece file is not its own
        return
    write_text(folder / FAST, tokenizer.backend_tokenizer.to_str(pretty=True))
    if hash_tokenizer(_read(folder, way_out=way_out)) != hash_tokenizer(tokenizer):
        raise BackboneError(
            f"{source}: transformers makes another tokenizer of it once {FAST} is there; {way_out}"
        )
    log.info("%s: %s is written beside its sentencepiece file", source, FAST)


def _slow_files(folder: Path) -> list[Path]:
    """The sentencepiece files of a folder without `tokenizer.json`."""
    return [] if (folder / FAST).is_file() else sorted(folder.glob("*.model"))


def _read(folder: Path, *, way_out: str = "set backbone.tokenizer") -> Any:
    """The tokenizer of a folder, as transformers reads it; never by code that lies there.

    Without its files transformers would return one with an empty vocabulary, and no error.
    """
    from transformers import AutoTokenizer
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    for file in (folder / "tokenizer_config.json", folder / "config.json"):
        if file.is_file():
            refuse_code(read_object(file, BackboneError), file, "AutoTokenizer")
    pieces = _slow_files(folder)
    if pieces:
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
            f"{folder}: no readable tokenizer ({first_line(error)}); {way_out}"
        ) from error
    vocab_files = sorted(set(tokenizer.vocab_files_names.values()))
    if vocab_files and not any((folder / file).is_file() for file in vocab_files):
        raise BackboneError(f"{folder}: no tokenizer here ({' or '.join(vocab_files)}); {way_out}")
    for file in pieces:
        if file.name in vocab_files:
            _check_pieces(tokenizer, file, way_out=way_out)
    return tokenizer


def _check_pieces(tokenizer: Any, file: Path, *, way_out: str) -> None:
    """Raise `BackboneError` if tokens are others than those of the library that wrote the file.

    transformers takes for granted what T5's own file is: unigram pieces, the unknown one third. Of
    equally likely splits ("2", "22" or "22", "2") either is right.
    """
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    n_pieces, unknown = original.get_piece_size(), original.unk_id()
    texts = make_texts(original.id_to_piece(list(range(n_pieces))))

    def read(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return ids

    def without_bytes(ids: Sequence[int]) -> list[int]:
        kept: list[int] = []
        for number in ids:
            is_byte = number < n_pieces and original.is_byte(number)
            if not (is_byte or number == unknown):
                kept.append(number)
            elif kept[-1:] != [unknown]:
                kept.append(unknown)
        return sorted(kept)

    warnings = set()
    for text, found, expected in zip(texts, read(texts), original.encode(texts), strict=True):
        if sorted(found) == sorted(expected):
            continue
        single = " ".join(text.split())
        if without_bytes(found) == without_bytes(expected):
            warnings.add("unknown characters are read as one token, not as their bytes")
        elif single != text and [found] == read([single]):
            warnings.add("spaces in a row, or at the end, are read as other tokens")
        else:
            raise BackboneError(
                f"{file}: transformers makes other tokens of {shortened(text)} than sentencepiece "
                f"does; put a right {FAST} beside it, or {way_out}"
            )
    for warning in sorted(warnings):
        log.warning("%s: %s", file, warning)


def _check_tokenizer(tokenizer: Any, blueprint: Blueprint, *, place: str, way_out: str) -> None:
    """Raise `BackboneError` if special tokens are missing or others than the backbone's.

    Also if ids exceed the embeddings.
    """
    config, verb = blueprint.model_config, " has" if place.endswith("tokenizer") else ""
    for token in blueprint.family.special_tokens:
        if getattr(tokenizer, token) is None:
            raise BackboneError(f"{place} has no {token}; {way_out}")
    n_pieces = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if n_pieces > config.vocab_size:
        raise BackboneError(
            f"{place}{verb} {n_pieces} pieces, the backbone embeds only {config.vocab_size}; "
            f"{way_out}"
        )
    for name in (f"{token}_id" for token in blueprint.family.special_tokens):
        own, wanted = getattr(tokenizer, name), getattr(config, name)
        if own not in (wanted if isinstance(wanted, list) else [wanted]):
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
    template = getattr(tokenizer, "chat_template", None)
    chat = "" if template is None else json.dumps(template, sort_keys=True)
    return hashlib.sha256(f"{text}{tokenizer.eos_token_id}{chat}".encode()).hexdigest()
