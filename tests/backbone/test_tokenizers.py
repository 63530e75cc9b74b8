"""A backbone's tokenizer, or another one that fits its embedding."""

import json
import shutil

import pytest
import sentencepiece
from small_backbones import one_line, stored
from small_pieces import T5_IDS, train_pieces
from small_t5 import CARD, SIZES, small_t5

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError


def tokenizer_of(**settings):
    config = BackboneConfig(**settings)
    return load_tokenizer(config, read_blueprint(config))


def tokenizer_error(**settings):
    with pytest.raises(BackboneError) as caught:
        tokenizer_of(**settings)
    return one_line(caught)


def test_random_weights_read_bytes():
    assert type(tokenizer_of(config=SIZES)).__name__ == "ByT5Tokenizer"


def test_a_folder_may_be_told_to_read_bytes(folder):
    assert type(tokenizer_of(name=str(folder), tokenizer="byt5")).__name__ == "ByT5Tokenizer"


def test_a_backbone_brings_its_own_tokenizer():
    assert len(tokenizer_of(name="builtin:toy")) == 50


def test_another_folders_tokenizer_may_be_named():
    assert len(tokenizer_of(config=SIZES, tokenizer="builtin:toy")) == 50


def test_a_folder_of_a_byte_model_needs_no_tokenizer_files(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert type(tokenizer_of(name=str(folder))).__name__ == "ByT5Tokenizer"


@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "T5Tokenizer"}])
def test_a_folder_without_tokenizer_files_is_refused(folder, config):
    """Transformers would make a tokenizer that knows no words."""
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_error(name=str(folder)) == (
        f"{folder}: no tokenizer here (spiece.model or tokenizer.json); set backbone.tokenizer"
    )


def test_a_broken_tokenizer_file_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    message = tokenizer_error(name=str(folder))
    assert message.startswith(f"{folder}: no readable tokenizer (")


def test_a_tokenizer_with_more_pieces_than_the_embedding_is_refused():
    config = {**SIZES, "vocab_size": 383}
    assert tokenizer_error(config=config) == (
        "backbone.tokenizer: 384 pieces, the backbone embeds only 383; "
        "choose the backbone's own tokenizer"
    )


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_tokenizer_without_padding_or_ending_is_refused(tmp_path, token):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN["builtin:toy"] / file, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings[token]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    message = tokenizer_error(config=SIZES, tokenizer=str(tmp_path))
    assert message.startswith(f"backbone.tokenizer: has no {token}")


@pytest.mark.parametrize("token", ["pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("is_own", [True, False])
def test_a_special_token_that_is_another_one_for_the_backbone_is_refused(
    make, original, token, is_own
):
    """Targets would close with one token, and generation wait for the other."""
    folder = make(stored(original), {**CARD, token: 7})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN["builtin:toy"] / file, folder)
    message = tokenizer_error(name=str(folder), tokenizer=None if is_own else "byt5")
    place = f"{folder}: its tokenizer has" if is_own else "backbone.tokenizer:"
    way_out = "set backbone.tokenizer" if is_own else "choose the backbone's own tokenizer"
    own = {"pad_token_id": 0, "eos_token_id": 1}[token]
    assert message == (
        f"{place} {token} {own}, {folder}/config.json says 7; correct the one that is wrong, or "
        f"{way_out}"
    )


def test_ids_of_random_weights_are_compared_too():
    assert tokenizer_error(config={**SIZES, "eos_token_id": 3}).startswith(
        "backbone.tokenizer: eos_token_id 1, backbone.config says 3; "
    )


# -- sentencepiece ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A vocabulary as T5's are."""
    return train_pieces(tmp_path_factory.mktemp("pieces"), **T5_IDS)


TEXTS = ("the frozen backbone", "  two   spaces, 3.5 % ", "\ufb01t caf\u00e9", "\u16a0 unknown")


@pytest.mark.parametrize("extra", [0, 100])
def test_a_folder_with_a_sentencepiece_file_alone_is_read_as_sentencepiece_reads_it(
    folder, pieces, extra
):
    """T0 and T5-LM-adapt on the hub; mT5 has no extra tokens, which its settings say."""
    shutil.copy(pieces, folder)
    if not extra:
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizer_of(name=str(folder))
    original = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    assert len(tokenizer) == 280 + extra
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == original.encode(text)
        assert tokenizer(text)["input_ids"] == [*original.encode(text), 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_id": 3, "eos_id": 1, "unk_id": 0, "bos_id": -1},
        {**T5_IDS, "model_type": "bpe"},
        {**T5_IDS, "add_dummy_prefix": False},
    ],
    ids=["other ids", "bpe", "no space in front"],
)
def test_a_sentencepiece_file_that_transformers_reads_wrongly_is_refused(
    folder, tmp_path, settings
):
    shutil.copy(train_pieces(tmp_path, **settings), folder)
    message = tokenizer_error(name=str(folder))
    assert message.startswith(f"{folder / 'spiece.model'}: transformers makes other tokens of ")
    assert message.endswith("; put a right tokenizer.json beside it, or set backbone.tokenizer")


@pytest.mark.parametrize(
    "settings",
    [{"remove_extra_whitespaces": False}, {"normalization_rule_name": "identity"}],
    ids=["all spaces", "no normalisation"],
)
def test_spaces_that_transformers_reads_otherwise_are_told_of(folder, tmp_path, settings, caplog):
    shutil.copy(train_pieces(tmp_path, **T5_IDS, **settings), folder)
    tokenizer_of(name=str(folder))
    assert caplog.messages == [
        f"{folder / 'spiece.model'}: spaces in a row, or at the end, are read as other tokens"
    ]


def test_bytes_of_unknown_characters_that_transformers_does_not_make_are_missed_aloud(
    make, tmp_path, caplog
):
    folder = make(stored(small_t5(vocab_size=600)), {**CARD, "vocab_size": 600})
    shutil.copy(train_pieces(tmp_path, **T5_IDS, byte_fallback=True, vocab_size=400), folder)
    tokenizer_of(name=str(folder))
    assert caplog.messages == [
        f"{folder / 'spiece.model'}: unknown characters are read as one token, not as their bytes"
    ]


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_a_package_that_a_sentencepiece_file_takes_is_named(folder, pieces, package, monkeypatch):
    shutil.copy(pieces, folder)
    monkeypatch.setattr(f"transformers.utils.is_{package}_available", lambda: False)
    assert tokenizer_error(name=str(folder)) == (
        f"{folder / 'spiece.model'}: cannot be read without {package}; pip install {package}"
    )


def test_a_pointer_in_place_of_a_sentencepiece_file_is_refused(folder):
    (folder / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    assert tokenizer_error(name=str(folder)).startswith(f"{folder}: no readable tokenizer (")


# -- code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_a_tokenizer_with_code_of_its_own_is_refused_and_nobody_is_asked(
    tmp_path, monkeypatch, file, known
):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN["builtin:toy"] / name, tmp_path)
    settings = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    settings |= {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    if not known:
        settings["tokenizer_class"] = "OwnTokenizer"
    (tmp_path / file).write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    message = tokenizer_error(config=SIZES, tokenizer=str(tmp_path))
    assert message.startswith(f"{tmp_path / file}: auto_map asks for code of its own (")
    assert message.endswith(", remove auto_map")


def test_a_tokenizer_beside_a_model_with_code_of_its_own_is_read(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN["builtin:toy"] / name, tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "own.Own"}}')
    assert len(tokenizer_of(config=SIZES, tokenizer=str(tmp_path))) == 50


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing-at-all"])
def test_a_missing_tokenizer_is_not_blamed_on_the_backbones_name(name):
    message = tokenizer_error(config=SIZES, tokenizer=name)
    assert message.startswith("backbone.tokenizer: ")
