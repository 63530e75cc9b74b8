"""The launcher's environment variables, found good before anything relies on them.

`deepspeed` and `torchrun` set them; scripts that start ranks themselves may get them wrong.
"""

import os
from collections.abc import Mapping

from mhr_scale.errors import EngineError, did_you_mean, shortened

WAY_OUT = "start ranks with deepspeed or torchrun, or unset it"
#: Numbers that a launch may set, and their smallest and largest values.
NUMBERS = {
    "RANK": (0, None),
    "LOCAL_RANK": (0, None),
    "WORLD_SIZE": (1, None),
    "LOCAL_SIZE": (1, None),
    "LOCAL_WORLD_SIZE": (1, None),
    "MASTER_PORT": (1, 65535),
    "TORCHELASTIC_RESTART_COUNT": (0, None),
    "OMP_NUM_THREADS": (1, None),
}
#: What one of several ranks cannot do without.
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ACCELERATORS = ("cpu", "cuda")


def check(variables: Mapping[str, str] = os.environ) -> None:
    """Raise `EngineError` for a variable that is not what a launcher sets."""
    numbers = {name: _number(name, variables[name]) for name in NUMBERS if name in variables}
    ranks = numbers.get("WORLD_SIZE", 1)
    if "RANK" in numbers and "WORLD_SIZE" not in numbers:
        raise EngineError(f"RANK={numbers['RANK']}, but WORLD_SIZE is not set; {WAY_OUT}")
    missing = [name for name in NEEDED if not variables.get(name)]
    if ranks > 1 and missing:
        raise EngineError(f"WORLD_SIZE={ranks}, but {missing[0]} is not set; {WAY_OUT}")
    for name in ("RANK", "LOCAL_RANK"):
        if numbers.get(name, 0) >= ranks:
            raise EngineError(
                f"{name}={numbers[name]}, but with WORLD_SIZE={ranks} it is at most {ranks - 1}; "
                f"{WAY_OUT}"
            )
    accelerator = variables.get("DS_ACCELERATOR", "cpu")
    if accelerator not in ACCELERATORS:
        raise EngineError(
            f"DS_ACCELERATOR={shortened(accelerator)}: must be one of {', '.join(ACCELERATORS)}, "
            f"or unset{did_you_mean(accelerator, ACCELERATORS)}"
        )


def _number(name: str, text: str) -> int:
    least, most = NUMBERS[name]
    first = text.partition(",")[0] if name == "OMP_NUM_THREADS" else text  # a list is by level
    if not (first.strip().isdecimal() and first.strip().isascii()):
        raise EngineError(f"{name}={shortened(text)}: must be a number; {WAY_OUT}")
    number = int(first)
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise EngineError(f"{name}={number}: must be {bounds}; {WAY_OUT}")
    return number
