"""Golden vectors: numbers of the method's published reference implementation.

`MHR_GOLDEN` names another folder of them.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

FOLDER = Path(os.environ.get("MHR_GOLDEN", Path(__file__).parent / "golden" / "data"))


def files(pattern: str) -> list[Path]:
    found = sorted(FOLDER.glob(pattern))
    if not found:
        raise pytest.UsageError(f"no golden file {pattern} in {FOLDER} (variable MHR_GOLDEN)")
    return found


def read(path: Path) -> SimpleNamespace:
    """Tensors under `.tensors`, metadata (numbers parsed) under `.meta`."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = {}
        for key, value in file.metadata().items():
            try:
                meta[key] = json.loads(value)
            except json.JSONDecodeError:
                meta[key] = value
    return SimpleNamespace(tensors=tensors, meta=meta)
