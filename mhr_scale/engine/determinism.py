"""`run.deterministic`: operations in their deterministic forms, in which a GPU repeats itself.

docs/method.md 16 says what is bit-equal with it, and what is without. Read from torch's sources,
never run on a GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic as torch_deterministic

from mhr_scale.errors import EngineError
from mhr_scale.run.runlog import log

#: What cuBLAS has to be told before CUDA starts: a buffer of its own for every stream. Values that
#: torch takes as deterministic, the one that costs no speed first.
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
#: NCCL adds in switches where there are such (NVLS), in an order that is not documented.
ALGORITHM, ALGORITHMS = "NCCL_ALGO", "^NVLS,NVLSTree"


@contextmanager
def switched(is_wanted: bool) -> Iterator[None]:
    """Inside, if wanted, torch uses deterministic forms only, and raises where it has none.

    What was set before is set again afterwards, but for the variables: CUDA has read them. Raises
    `EngineError` if it has begun without them.
    """
    if not is_wanted:
        yield
        return
    _prepare()
    memory: Any = torch_deterministic
    old = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    # a safeguard for programs that read what they have not written, at the cost of writing it
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(old[0], warn_only=old[1])
        memory.fill_uninitialized_memory = old[2]


def _prepare() -> None:
    """Set the variables of cuBLAS and NCCL."""
    workspace = os.environ.get(WORKSPACE)
    if workspace not in WORKSPACES:
        if torch.cuda.is_initialized():
            raise EngineError(
                f"run.deterministic: CUDA has begun in this process without {WORKSPACE}; start the "
                f"program under {WORKSPACE}={WORKSPACES[0]}"
            )
        if workspace is not None:
            log.warning(
                "%s=%s: run.deterministic sets it to %s", WORKSPACE, workspace, WORKSPACES[0]
            )
        os.environ[WORKSPACE] = WORKSPACES[0]
    os.environ.setdefault(ALGORITHM, ALGORITHMS)
