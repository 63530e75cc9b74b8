"""A recipe in the current folder, written and loaded."""

from pathlib import Path

import pytest
from recipe_parts import GOOD

from mhr_scale.config import PretrainConfig
from mhr_scale.recipe import reading


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes r.yaml into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "r.yaml"

    return write


@pytest.fixture
def load(write):
    def load(text=GOOD, *overrides, schema=PretrainConfig):
        return reading.load(schema, write(text), overrides)

    return load
