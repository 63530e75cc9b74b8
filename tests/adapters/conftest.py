"""One thread, the helper modules of the tests on the path, and adapters that PEFT can hold."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft_folders import LORA, ROUTED, SINGLES, make, write

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SINGLES)
def single(request):
    return make(*SINGLES[request.param])


@pytest.fixture(params=ROUTED)
def routed(request):
    return make(ROUTED[request.param])


@pytest.fixture
def lora_folder(tmp_path):
    return write(make(LORA), tmp_path / "peft")
