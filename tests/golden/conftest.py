"""Every golden file that is found becomes a test."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_vectors import files, read


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, pattern in (
        ("layer_file", "layer_*.safetensors"),
        ("model_file", "model_*.safetensors"),
        ("losses_file", "tfew_losses_*.safetensors"),
    ):
        if fixture in metafunc.fixturenames:
            found = files(pattern)
            metafunc.parametrize(fixture, found, ids=[path.stem for path in found], scope="module")


@pytest.fixture
def layer(layer_file: Path) -> SimpleNamespace:
    return read(layer_file)


@pytest.fixture
def losses(losses_file: Path) -> SimpleNamespace:
    return read(losses_file)
