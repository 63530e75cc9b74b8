"""Fixtures of all tests."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import ROOT

SHARED = Path(os.environ.get("MHR_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and backbones, or a skip."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data in {SHARED} (variable MHR_SHARED)")
    return SHARED


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    """Engines of a module's tests and fixtures take the CPU, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests of tiny tensors run faster on one thread, and the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """A launch script started inside a test leaves no handler on a stream that pytest closes."""
    yield
    log = logging.getLogger("mhr_scale")
    log.handlers, log.propagate = [], True
