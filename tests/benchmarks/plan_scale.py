"""Time and memory of a mixture plan as large as the uncapped T0 mixture.

313 tasks with log-normal sizes, 90.9 million rows in all. Everything is measured in a fresh
process, through the public API.
"""

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

N_TASKS = 313
N_ROWS = 90_900_000
SIGMA = 1.7
"""Spread of the logarithm of the sizes: they go from 475 rows to 11 million."""

RANGES = {16: 40_000, 1_024: 1_000, 65_536: 32}
"""Samples per call, and calls: always many blocks of the plan."""

MIB = 1024**2


def main() -> None:
    """Measure in a process of its own and print a table."""
    if sys.argv[1:] == ["--here"]:
        print(json.dumps(measured()))
        return
    result = subprocess.run(
        [sys.executable, __file__, "--here"], stdout=subprocess.PIPE, text=True, check=True
    )
    for name, value in json.loads(result.stdout).items():
        print(f"{name:<44}{value:>14}")


def sizes() -> list[int]:
    """Log-normal sizes at equally spaced quantiles; the largest task takes what rounding left."""
    quantiles = [NormalDist().inv_cdf((n + 0.5) / N_TASKS) for n in range(N_TASKS)]
    shares = [math.exp(SIGMA * quantile) for quantile in quantiles]
    rows = [int(N_ROWS * share / sum(shares)) for share in shares]
    return [*rows[:-1], rows[-1] + N_ROWS - sum(rows)]


def measured() -> dict[str, str]:
    """Names and figures, in the order in which they were measured."""
    from mhr_scale.config import MixtureConfig
    from mhr_scale.tasks.mixture import MixturePlan, Share

    imported = peak()
    shares = [Share(name=f"task{n}", size=size) for n, size in enumerate(sizes())]
    start = time.perf_counter()
    plan = MixturePlan(shares, config=MixtureConfig(), seed=0)
    found = {"plan built, s": f"{time.perf_counter() - start:.3f}"}
    assert plan.epoch_size == N_ROWS
    found["first sample, s"] = f"{seconds(plan.samples, 0, 1):.3f}"
    for size, calls in RANGES.items():
        taken = seconds(walk, plan, size, calls)
        found[f"samples/s, {size:,} per call"] = f"{size * calls / taken:,.0f}"
        found[f"calls/s, {size:,} per call"] = f"{calls / taken:,.0f}"
    for name, at in {"in mid-epoch": N_ROWS // 2, "across two epochs": N_ROWS - 8}.items():
        found[f"16 samples {name}, s"] = f"{seconds(plan.samples, at, at + 16):.3f}"
    found["peak resident memory after imports, MiB"] = f"{imported:.0f}"
    found["peak resident memory, MiB"] = f"{peak():.0f}"
    return found


def walk(plan: Any, size: int, calls: int) -> None:
    """Ask for consecutive ranges, as training steps do."""
    for call in range(calls):
        plan.samples(size * call, size * (call + 1))


def seconds(function: Callable[..., object], *arguments: Any) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def peak() -> float:
    """Peak resident memory of this process; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


if __name__ == "__main__":
    main()
