"""Long toy runs in one process: does memory stay flat, does the pace?

    python tests/robustness/soak.py --steps 20000
    python tests/robustness/soak.py --job-steps 10000 --minutes 8

The first pre-trains, the second runs few-shot jobs in waves. The process is looked at from outside:
its resident memory and its processor time whenever its metrics show so many steps more. The pace
is in steps per second of processor time, which other programs on the machine change little. What
comes before the warm-up does not count. A run that does not fit into `--minutes` is asked to stop.
"""

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS)]

import psutil  # noqa: E402
from processes import start, succeed  # noqa: E402

TOY = (
    "launch/recipes/toy.yaml",
    "tasks.train_examples=50",
    "tasks.validation_examples=2",
    "batch.batch_size=4",
    "batch.micro_batch_size=4",
)
#: Few-shot jobs: ten tasks by so many seeds, in waves of `WAVE`.
JOB_STEPS, WAVE = 100, 5
WAVES = (
    "launch/recipes/toy_adapt.yaml",
    f"protocol={{steps: {JOB_STEPS}, batch_size: 2, loss: language_model, max_input_tokens: 32, "
    "max_target_tokens: 32}",
    "selection={on: test, every_epochs: 5}",
    "scoring={metric: accuracy, examples: 2}",
    f"waves={{size: {WAVE}, save_every: 10}}",
    "shots.count=8",
)


@dataclass(frozen=True, slots=True)
class Look:
    """How far a run was at a moment, and what it held."""

    seconds: float
    processor_seconds: float
    steps: int
    resident_bytes: int


def main() -> int:
    """Run what is asked for; 1 if memory grew by 1 % or more, or the pace fell by a tenth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--steps", type=int, help="of pre-training")
    what.add_argument("--job-steps", type=int, help="of few-shot jobs in waves")
    parser.add_argument("--every", type=int, default=500, help="steps between two looks")
    parser.add_argument("--warm-up", type=int, default=2000, help="steps that do not count")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop the run after so long")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        run = soak_steps if options.steps else soak_waves
        looks = run(options.steps or options.job_steps, Path(name), options)
    found = judge(looks, options.warm_up, what="steps" if options.steps else "job-steps")
    print(json.dumps(found))
    print(describe(found))
    return int(not found["is_flat"])


def soak_steps(steps: int, folder: Path, options: argparse.Namespace) -> list[Look]:
    """Pre-train on the toy suite, saving and validating on the way."""
    run = folder / "run"
    process = start(
        "launch/pretrain.py",
        *TOY,
        f"run.folder={run}",
        f"schedule.steps={steps}",
        f"run.log_every={options.every}",
        "run.save_every=250",
        f"run.validate_every={options.every}",
    )
    return watch(process, lambda: count_lines(run), options, per_line=options.every)


def soak_waves(job_steps: int, folder: Path, options: argparse.Namespace) -> list[Look]:
    """Adapt to the ten held-out toy tasks, as many seeds as it takes, from a short run."""
    source, run = folder / "source", folder / "run"
    succeed("launch/pretrain.py", *TOY, f"run.folder={source}", "schedule.steps=20")
    seeds = list(range(-(-job_steps // (10 * JOB_STEPS))))
    process = start(
        "launch/adapt.py",
        *WAVES,
        f"variants={{MHR: {{adapter: {source}}}}}",
        f"shots.seeds={seeds}",
        f"run.folder={run}",
        "run.log_every=10",
    )
    return watch(process, lambda: count_job_lines(run), options, per_line=10)


def count_lines(run: Path) -> int:
    """Logged steps of a run."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def count_job_lines(run: Path) -> int:
    """Logged steps of all jobs."""
    files = run.glob("jobs/*/*/*/metrics.jsonl")
    return sum(file.read_text().count('"grad_norm"') for file in files)


def watch(
    process: subprocess.Popen[str],
    count: Callable[[], int],
    options: argparse.Namespace,
    *,
    per_line: int,
) -> list[Look]:
    """Look at a run whenever it is so many steps further; it must end well, or as asked."""
    watched, begun, looks = psutil.Process(process.pid), time.monotonic(), list[Look]()
    is_asked = False
    while process.poll() is None:
        steps = count() * per_line
        if steps >= (looks[-1].steps if looks else 0) + options.every:
            looks.append(look(watched, time.monotonic() - begun, steps))
        if not is_asked and time.monotonic() - begun > 60 * options.minutes:
            process.send_signal(signal.SIGTERM)
            is_asked = True
        time.sleep(0.2)
    output = process.communicate()[0]
    if process.returncode not in ((0, 75) if is_asked else (0,)):
        raise SystemExit(f"the run ended with code {process.returncode}:\n{output[-4000:]}")
    return looks


def look(watched: psutil.Process, seconds: float, steps: int) -> Look:
    """What a process holds at this moment."""
    times = watched.cpu_times()
    return Look(seconds, times.user + times.system, steps, watched.memory_info().rss)


def judge(looks: Sequence[Look], warm_up: int, *, what: str) -> dict[str, Any]:
    """Growth of memory and change of pace from the first quarter of the looks to the last.

    Steps count from the warm-up on; memory in bytes, the pace in steps per second.
    """
    counted = [one for one in looks if one.steps >= warm_up]
    if len(counted) < 8:
        raise SystemExit(f"{len(counted)} looks after the warm-up are too few; take more steps")
    quarter = len(counted) // 4
    memory = [
        statistics.mean(one.resident_bytes for one in part)
        for part in (counted[:quarter], counted[-quarter:])
    ]
    pairs = list(itertools.pairwise(counted))
    paces = [
        (part[-1][1].steps - part[0][0].steps)
        / (part[-1][1].processor_seconds - part[0][0].processor_seconds)
        for part in (pairs[:quarter], pairs[-quarter:])
    ]
    growth, change = memory[1] / memory[0] - 1, paces[1] / paces[0] - 1
    return {
        "unit": what,
        "steps": counted[-1].steps,
        "warm_up": warm_up,
        "seconds": round(looks[-1].seconds, 1),
        "looks": [(one.steps, one.resident_bytes, one.processor_seconds) for one in looks],
        "resident_mb": [round(value / 1e6, 1) for value in memory],
        "memory_growth": growth,
        "steps_per_processor_second": [round(value, 1) for value in paces],
        "pace_change": change,
        "is_flat": growth < 0.01 and change > -0.1,
    }


def describe(found: dict[str, Any]) -> str:
    """The figures in one line."""
    (before, after), (first, last) = found["resident_mb"], found["steps_per_processor_second"]
    return (
        f"{found['steps']:,} {found['unit']}: memory {before:.1f} -> {after:.1f} MB "
        f"({found['memory_growth']:+.2%}), pace {first:.1f} -> {last:.1f} per second "
        f"of processor time ({found['pace_change']:+.1%}), first and last quarter after "
        f"{found['warm_up']:,}, {found['seconds'] / 60:.1f} minutes"
    )


if __name__ == "__main__":
    sys.exit(main())
