"""Fixtures of the verbs' tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from stopped_runs import recipe
from toy_finetunes import export_lora

from mhr_scale.run import stopping
from mhr_scale.verbs.pretrain import pretrain


@pytest.fixture(autouse=True)
def _unasked() -> Iterator[None]:
    """A request to stop ends with its test."""
    stopping.forget()
    yield
    stopping.forget()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pre-training that nothing has stopped."""
    folder = tmp_path_factory.mktemp("stopped") / "whole"
    pretrain(recipe(folder))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The averaged adapter of a toy inventory as a PEFT folder."""
    return export_lora(tmp_path_factory.mktemp("exported") / "toy")
