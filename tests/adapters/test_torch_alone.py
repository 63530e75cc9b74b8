"""The adapters need torch and nothing else."""

import subprocess
import sys

import pytest

BLOCKED = ("transformers", "deepspeed", "pydantic", "yaml", "safetensors", "numpy")

HOOK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""

IMPORT = "import mhr_scale.adapters"

STEP = """
import torch
from mhr_scale import Adapter, AdapterConfig, average, collapse
from mhr_scale.adapters.sites import Site
from mhr_scale.adapters.wrapping import wrap

site = Site(name="x", in_features=4, out_features=6, stack="encoder", block=0, sublayer=0)
adapter = Adapter(AdapterConfig(n_skills=2, n_splits=2), (site,), task_names=["a", "b"])
model = torch.nn.ModuleDict({"x": torch.nn.Linear(4, 6)})
adapter.bind(wrap(model, [site]))
with adapter.slots(["b", "a", "b"]) as slots:
    slots.backward(model["x"](torch.ones(3, 2, 4)).sum())
average(adapter), collapse(adapter, "a")
"""


def run_blocked(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HOOK + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("code", [IMPORT, STEP], ids=["import", "a-training-step"])
def test_adapters_work_without_any_other_library(code):
    result = run_blocked(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", BLOCKED)
def test_the_block_is_real(name):
    result = run_blocked(
        f"""
try:
    import {name}
except ModuleNotFoundError as error:
    assert "is blocked" in str(error)
else:
    raise AssertionError
"""
    )
    assert result.returncode == 0, result.stderr


def test_importing_adapters_loads_no_other_library():
    # torch itself loads numpy where it is there
    unwanted = set(BLOCKED) - {"numpy"}
    code = f"import sys, mhr_scale.adapters; print(*({unwanted!r} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "")
