"""Few-shot jobs in waves, against one after another and against PEFT with a plain loop.

python tests/benchmarks/few_shot_waves.py [--json FILE] [--quick]
    24 jobs as waves of 24 and of 8, one by one in our own loop, and one by one with stock PEFT
python tests/benchmarks/few_shot_waves.py --backbone FOLDER --rows 2 --input-tokens 16
    the same over a stored backbone of either form; for one of billions of weights give also
    --dtype bfloat16 --jobs 8 --alone 1 --sizes 8 --kinds full --steps 1 --turns 2 --forms packed
    --no-peft --no-counts
DS_ACCELERATOR=cpu deepspeed --num_gpus 2 tests/benchmarks/few_shot_waves.py --placement zero3
    waves of 8 against one by one over a sharded (zero3_offload: offloaded) backbone
python tests/benchmarks/few_shot_waves.py --model-gpu
    what a GPU would give, from operations and bytes counted at the real shapes of T5

Rows of our own ways lie flat, or are padded where a way says so. All ways take turns, in an order
that is reversed every other time; times are medians over the turns and ratios medians over the
ratios of a turn. Opening a job and its first step, which makes the optimizer's state, are not
timed.
"""

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from few_shot_counts import count, counted_gathers
from few_shot_gpu import SHAPES, estimates
from few_shot_peft import Method, PeftLoop
from few_shot_ways import (
    KINDS,
    OPTIMIZERS,
    Bench,
    Hall,
    Setting,
    Way,
    build_bare,
)

from mhr_scale.engine.ds_config import read_ds_config
from mhr_scale.engine.engine import Engine
from mhr_scale.jobs.lockstep import KINDS as PASSES
from mhr_scale.jobs.lockstep import Lockstep
from mhr_scale.run.runlog import Progress, rank, start_logging

SETTINGS = {
    "d64-2x16": Setting(d_model=64, layers=2, rows=2, tokens=16),
    "d64-8x16": Setting(d_model=64, layers=2, rows=8, tokens=16),
    "d64-8x4-48": Setting(d_model=64, layers=2, rows=8, tokens=48, fewest=4),
    "d64-8x48": Setting(d_model=64, layers=2, rows=8, tokens=48),
    "d128-8x32": Setting(d_model=128, layers=4, rows=8, tokens=32),
    "d256-8x64": Setting(d_model=256, layers=4, rows=8, tokens=64),
    "t5-small": Setting(
        d_model=512, d_ff=1024, heads=8, layers=6, rows=8, tokens=32, vocabulary=32128
    ),
}
PLACEMENTS = {
    "replicated": "ds_configs/replicated.json",
    "zero3": "ds_configs/cpu.json",
    "zero3_offload": "ds_configs/zero3_offload.json",
}
N_JOBS = 24
#: Wave sizes that are compared with one by one.
SIZES = (24, 8)
#: How rows lie, and the setting `waves.packing`.
FORMS = {"packed": None, "padded": False}
#: Steps in which DeepSpeed learns the order of the modules, before it gathers ahead.
TRACED_STEPS = 4
#: Time of this process alone, and time that passes: ranks wait for each other.
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
Row = dict[str, Any]
Seconds = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run one of the three comparisons, print its table, and return its rows."""
    args = parse(arguments)
    start_logging()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|bitsandbytes)\b")
    if args.model_gpu:
        shapes = args.shapes[:1] if args.quick else args.shapes
        rows = estimates(shapes, tokens=args.tokens[:1] if args.quick else args.tokens)
        printed = to_markdown(rows, skip=("counts",))
    else:
        rows = compare_placed(args) if args.placement else compare_all(args)
        what = ["cpu_ms", "cpu_ratios", "wall_ratios", "operations", "kernels"]
        if args.no_counts:
            what = ["wall_ms", "wall_ratios", "cpu_ms", "cpu_ratios"]
        if args.placement:
            what = ["wall_ms", "wall_ratios", "cpu_ms", "cpu_ratios", "gathers", "gathered_mib"]
        printed = "\n".join(pivot(rows, one) for one in what)
    if rank() == 0:
        print(printed)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; `--quick` shortens whatever was not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, help="backbones and batches (all)")
    add("--backbone", help="a stored backbone instead, under --rows, --input-tokens and --dtype")
    add("--dtype", choices=("bfloat16", "float32"), default="float32", help="(float32)")
    add("--rows", type=int, default=2, help="rows of a job's step (2)")
    add("--input-tokens", type=int, default=16, help="tokens of an input (16)")
    add("--fewest", type=int, default=0, help="inputs of so many tokens or more (all as long)")
    add("--sizes", nargs="+", type=int, default=[*SIZES], help="jobs per wave (24 8)")
    add("--alone", type=int, help="jobs that take turns one by one (all)")
    add("--forms", nargs="+", choices=FORMS, default=[*FORMS], help="how rows lie (both)")
    add("--no-peft", action="store_true", help="our own ways alone")
    add("--no-counts", action="store_true", help="without counting operations, which is slow")
    add("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="what a job trains (all)")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"], help="(adamw)")
    add("--jobs", type=int, help="jobs in all (24), under --placement on each rank (8)")
    add("--steps", type=int, default=2, help="timed steps of each job in a turn (2)")
    add("--turns", type=int, help="turns (7)")
    add("--threads", type=int, default=1, help="threads of one process (1)")
    add("--placement", choices=PLACEMENTS, help="compare over a backbone placed by DeepSpeed")
    add("--ds-config", help="another DeepSpeed file for --placement")
    add("--model-gpu", action="store_true", help="estimate a GPU's times from counted numbers")
    add("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES], help="of --model-gpu (all)")
    add("--tokens", nargs="+", type=int, default=[32, 256], help="of --model-gpu (32 256)")
    add("--json", help="write the rows to this file too")
    add("--quick", action="store_true", help="the smallest of everything: does it run at all?")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.known = dict(SETTINGS)
    if args.backbone:
        args.settings = ["given"]
        args.known["given"] = Setting(
            folder=args.backbone,
            dtype=args.dtype,
            rows=args.rows,
            tokens=args.input_tokens,
            fewest=args.fewest,
        )
    args.settings = args.settings or (["d64-2x16"] if args.quick else [*SETTINGS])
    args.turns = args.turns or (1 if args.quick else 7)
    args.jobs = args.jobs or (2 if args.quick else 8 if args.placement else N_JOBS)
    args.alone = min(args.alone or args.jobs, args.jobs)
    args.sizes = sorted({min(size, args.jobs) for size in args.sizes} | {1}, reverse=True)
    return args


# -- one process -----------------------------------------------------------------------------------


def compare_all(args: argparse.Namespace) -> list[Row]:
    """Compare all ways for all settings and optimizers."""
    torch.set_num_threads(args.threads)
    n_ways = sum(
        len(args.forms) * len(args.sizes) + len(peft_methods(args, kind)) for kind in args.kinds
    )
    n_runs = len(args.settings) * len(args.optimizers) * n_ways * (args.turns + 1)
    progress = Progress(n_runs, start=0, what="few-shot", unit="run")
    rows = []
    for name in args.settings:
        engine = Engine(read_ds_config(None), timeout_seconds=600)
        ours = Hall.build(args.known[name], engine)
        bare = None if args.no_peft else build_bare(args.known[name], engine)
        for optimizer in args.optimizers:
            rows += compare(args, name, optimizer, ours, bare, progress)
    progress.close()
    return rows


def compare(
    args: argparse.Namespace, name: str, optimizer: str, ours: Hall, bare: Any, progress: Progress
) -> list[Row]:
    """Compare all ways and kinds for one setting and optimizer, in turn."""
    setting = args.known[name]
    ways: dict[tuple[str, str], Way] = {}
    for kind in args.kinds:
        made: list[Way] = []
        for packing in (FORMS[form] for form in args.forms):
            bench = Bench(setting, kind, optimizer, ours.sites, packing=packing)
            made += [ours.waves(bench, size=size) for size in args.sizes]
        made += [PeftLoop(bench, bare, method=method) for method in peft_methods(args, kind)]
        ways |= {(kind, way.name): way for way in made}
    counts = {}
    for key, way in ways.items():
        counts[key] = counted(way, only_loss=args.no_counts)
        progress.advance(f"{name} {optimizer} {key}: counted")
    check_losses({key: found["loss"] for key, found in counts.items()}, setting.dtype)
    times: dict[tuple[str, str], list[Seconds]] = {key: [] for key in ways}
    for turn in range(args.turns):
        for key in [*ways][:: -1 if turn % 2 else 1]:
            n_jobs = args.jobs if ways[key].size > 1 else args.alone
            times[key].append(timed(ways[key], range(n_jobs), args.steps))
            progress.advance(f"{name} {optimizer} {key[0]}, {key[1]}")
    rows = []
    head = {"setting": setting.name, "optimizer": optimizer}
    for kind, title in ways:
        own = {"kind": kind, "way": title}
        rows.append(head | own | figures(kind, title, times) | counts[kind, title])
    return rows


def peft_methods(args: argparse.Namespace, kind: str) -> tuple[Method, ...]:
    """What the plain loop trains beside jobs of a kind: an average is a plain LoRA."""
    if args.no_peft:
        return ()
    return ("lora",) if kind == "average" else ("lora", "poly")


def timed(way: Way, numbers: Sequence[int], steps: int) -> Seconds:
    """Seconds per job-step, by clock, of training some jobs for so many steps each.

    `way.size` jobs train at a time. Their opening and first step are not timed.
    """
    total = dict.fromkeys(CLOCKS, 0.0)
    gc.collect()
    for at in range(0, len(numbers), way.size):
        handle = way.open(numbers[at : at + way.size])
        way.step(handle)
        begun = {name: clock() for name, clock in CLOCKS.items()}
        for _ in range(steps):
            way.step(handle)
        for name, clock in CLOCKS.items():
            total[name] += clock() - begun[name]
        way.close(handle)
    return {name: seconds / (len(numbers) * steps) for name, seconds in total.items()}


def counted(way: Way, *, only_loss: bool) -> Row:
    """Operations and kernels per job-step, and the first job's first loss."""
    handle = way.open(range(way.size))
    loss = way.step(handle)[0]
    if only_loss:
        way.close(handle)
        return {"loss": loss}
    found = count(lambda: way.step(handle))
    way.close(handle)
    return {**found.per(way.size), "loss": loss}


def check_losses(losses: Mapping[tuple[str, str], float], dtype: str) -> None:
    """All ways train the same job; PEFT's Poly draws noise and stays close only."""
    expected = next(iter(losses.values()))
    for (kind, way), loss in losses.items():
        tolerance = 1e-2 if way == "PEFT Poly" or dtype == "bfloat16" else 1e-4
        assert abs(loss / expected - 1.0) < tolerance, (kind, way, loss, expected)


def figures(kind: str, way: str, times: Mapping[tuple[str, str], Sequence[Seconds]]) -> Row:
    """By clock: median milliseconds, and how many times as long the other ways of a kind take."""
    mine = times[kind, way]
    found: Row = {}
    for clock in CLOCKS:
        own = [seconds[clock] for seconds in mine]
        found[f"{clock}_ms"] = 1000 * statistics.median(own)
        found[f"{clock}_ratios"] = {
            other: statistics.median(b[clock] / a for a, b in zip(own, theirs, strict=True))
            for (other_kind, other), theirs in times.items()
            if other_kind == kind and other != way
        }
        found[f"{clock}_all_ms"] = [1000 * value for value in own]
    return found


# -- ranks over a placed backbone ------------------------------------------------------------------


def compare_placed(args: argparse.Namespace) -> list[Row]:
    """Compare waves with one by one over a backbone that DeepSpeed carries. Collective."""
    engine = Engine(
        read_ds_config(args.ds_config or PLACEMENTS[args.placement]), timeout_seconds=600
    )
    lockstep = Lockstep(engine, dict.fromkeys(PASSES, lambda: None))
    n_runs = len(args.settings) * len(args.optimizers) * len(args.kinds) * 2 * args.turns
    progress = Progress(n_runs, start=0, what=args.placement, unit="run")
    rows = []
    try:
        for name in args.settings:
            hall = Hall.build(args.known[name], engine)
            for optimizer in args.optimizers:
                for kind in args.kinds:
                    bench = Bench(args.known[name], kind, optimizer, hall.sites)
                    ways: list[Way] = [
                        hall.waves(bench, size=size, turn=lambda: lockstep.turn("train"))
                        for size in (args.jobs, 1)
                    ]
                    rows += placed(args, engine, bench, ways, progress)
    finally:
        progress.close()
        engine.close()
    return rows


def placed(
    args: argparse.Namespace, engine: Engine, bench: Bench, ways: Sequence[Way], progress: Progress
) -> list[Row]:
    """Rows of two ways that take turns; a turn takes as long as its slowest rank. Collective."""
    mine = range(engine.rank * args.jobs, (engine.rank + 1) * args.jobs)
    times: dict[tuple[str, str], list[Seconds]] = {(bench.kind, way.name): [] for way in ways}
    gathered = {}
    timed(ways[0], mine, TRACED_STEPS)
    for turn in range(args.turns):
        for way in ways[:: -1 if turn % 2 else 1]:
            engine.gather_barrier()
            with counted_gathers() as gathers:
                seconds = engine.gather_objects(timed(way, mine, args.steps))
            slowest = {clock: max(one[clock] for one in seconds) for clock in CLOCKS}
            times[bench.kind, way.name].append(slowest)
            progress.advance(f"{bench.setting.name} {bench.kind} {way.name}")
            # the untimed first step of every wave gathers like the others
            n_steps = args.jobs * (args.steps + 1)
            gathered[way.name] = {
                "gathers": gathers.calls / n_steps,
                "gathered_mib": gathers.bytes_gathered / n_steps / 2**20,
            }
    return [
        {
            "setting": bench.setting.name,
            "optimizer": bench.optim.name,
            "kind": bench.kind,
            "placement": args.placement,
            "ranks": engine.world_size,
            "way": way.name,
            **figures(bench.kind, way.name, times),
            **gathered[way.name],
        }
        for way in ways
    ]


# -- tables ----------------------------------------------------------------------------------------


def pivot(rows: Sequence[Row], what: str) -> str:
    """One number of every way side by side, or the ratios of all ways to the waves."""
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row["setting"], row["optimizer"], row["kind"])
        line = lines.setdefault(key, dict(zip(("setting", "optimizer", "kind"), key, strict=True)))
        if not what.endswith("ratios"):
            line[row["way"]] = row[what]
        elif row["way"].startswith("waves"):
            line |= {
                f"{other} / {row['way']}": ratio
                for other, ratio in row[what].items()
                if not other.startswith("waves")
            }
    titles = {
        "cpu_ms": "milliseconds of CPU time per job-step",
        "wall_ms": "milliseconds per job-step",
        "cpu_ratios": "ratios of CPU times: medians over turns",
        "wall_ratios": "ratios of times: medians over turns",
        "gathered_mib": "MiB gathered per job-step, on each rank",
    }
    title = titles.get(what, f"{what} per job-step")
    return f"\n{title}\n\n{to_markdown([*lines.values()])}"


def to_markdown(rows: Sequence[Row], *, skip: Sequence[str] = ()) -> str:
    """A table of rows that need not have all columns."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row)]
    columns = [name for name in columns if name not in skip]
    lines = [columns, ["---"] * len(columns)]
    lines += [[to_text(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_text(value: Any) -> str:
    """A cell: three significant digits, no decimals from 100 on."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
