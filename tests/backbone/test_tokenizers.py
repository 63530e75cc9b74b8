"""A backbone's tokenizer, or another one that fits its embedding."""

import json
import shutil

import pytest
from small_backbones import one_line
from small_t5 import SIZES

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


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing-at-all"])
def test_a_missing_tokenizer_is_not_blamed_on_the_backbones_name(name):
    message = tokenizer_error(config=SIZES, tokenizer=name)
    assert message.startswith("backbone.tokenizer: ")
