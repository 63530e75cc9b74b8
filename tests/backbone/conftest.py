"""Backbone folders, and building them as a verb does."""

import json

import pytest
from small_backbones import stored, write_weights
from small_t5 import CARD, small_t5

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.engine import Engine


@pytest.fixture
def make(tmp_path):
    """Makes a backbone folder: configuration and weights."""

    def make(tensors, card=CARD, kind="safetensors"):
        folder = tmp_path / "backbone"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(card))
        write_weights(folder, tensors, kind)
        return folder

    return make


@pytest.fixture(scope="module")
def original():
    return small_t5()


@pytest.fixture
def folder(make, original):
    return make(stored(original))


@pytest.fixture
def build(monkeypatch):
    """Builds a backbone as a verb does, on CPU; transformers' own gelu, to compare bit for bit."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def build(**settings):
        config = BackboneConfig(**{"dtype": "float32", "fused_gate": False, **settings})
        return Engine({}, timeout_seconds=60).build(config, read_blueprint(config))

    return build


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
