"""Fixtures of the verbs' tests."""

from collections.abc import Iterator

import pytest

from mhr_scale import stopping


@pytest.fixture(autouse=True)
def _unasked() -> Iterator[None]:
    """A request to stop ends with its test."""
    stopping.forget()
    yield
    stopping.forget()
