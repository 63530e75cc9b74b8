"""Step time and memory: the frozen backbone, our adapters, PEFT's, and the paper's way of mixing.

python tests/benchmarks/step_time.py [--tokens 64 128 256] [--turns 9] [--json FILE]
    forward and backward of every way, the optimizer's pass, and what each switch does to logits
python tests/benchmarks/step_time.py --model llama --tokens 256 --parts steps
    the same over a decoder-only backbone, PEFT with logits everywhere and at targets only
python tests/benchmarks/step_time.py --parts ranks start
    tokens/s on one rank and two, replicated and ZeRO-3, through the launcher; start-up and loading
python tests/benchmarks/step_time.py --device cuda --model xxl --rows 8 --tokens 256
    the same over random T5-XXL weights in bfloat16 on a GPU

All ways share the weights of one backbone and take turns, in an order that is reversed every other
time. Times are medians over the turns, ratios medians over the ratios of a turn.
"""

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from step_time_causal import CAUSAL_BASES, CAUSAL_SHAPES, build_causal, causal_ways
from step_time_counts import counted
from step_time_optimizer import compare
from step_time_ranks import start_up, throughput
from step_time_ways import BASES, SHAPES, SWITCHES, Setting, Way, all_ways, build_t5, fuse
from torch import Tensor

from mhr_scale.run.runlog import Progress, start_logging

RESULTS = Path(__file__).parent / "results"
PARTS = ("steps", "optimizer", "logits", "ranks", "start")
MODELS = "T5 v1.1 (small: 6+6, d 256) or Llama (8 blocks, d 512, 49,152 tokens) (small)"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Row:
    """Run the parts asked for, print their tables, and return what the JSON file gets."""
    args = parse(arguments)
    start_logging()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|bitsandbytes)\b")
    torch.set_num_threads(args.threads)
    setting = Setting(
        model=args.model,
        rows=args.rows,
        targets=args.targets,
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
    )
    found: Row = {"machine": machine(setting)}
    if {"steps", "optimizer", "logits"} & set(args.parts):
        is_causal = args.model in CAUSAL_SHAPES
        model = (build_causal if is_causal else build_t5)(setting)
        if "steps" in args.parts:
            found["steps"] = [
                row
                for tokens in args.tokens
                for row in time_ways(model, replace(setting, tokens=tokens), args.turns, args.ways)
            ]
        if "optimizer" in args.parts:
            found["optimizer"] = compare(model, setting, turns=args.turns)
        if "logits" in args.parts and not is_causal:
            found["logits"] = logit_errors(model, replace(setting, tokens=args.tokens[0]))
    if "ranks" in args.parts:
        found["ranks"] = throughput(args.shared, steps=args.steps)
    if "start" in args.parts:
        found["start"] = start_up(args.shared)
    found["machine"]["load_after"] = os.getloadavg()
    print(to_markdown(found))
    if args.json:
        keep(Path(args.json), found)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = ["steps", "optimizer", "logits"]
    add("--parts", nargs="+", choices=PARTS, default=default, help=f"({' '.join(default)})")
    add("--model", choices=[*SHAPES, *CAUSAL_SHAPES], default="small", help=MODELS)
    add("--rows", type=int, default=8, help="examples, each of another task (8)")
    add("--tokens", nargs="+", type=int, default=[64, 128, 256], help="input tokens (64 128 256)")
    add("--targets", type=int, default=16, help="target tokens (16)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--threads", type=int, default=1, help="threads of one process (1)")
    add("--ways", nargs="+", default=(), help="these ways and the frozen ones (all)")
    add("--turns", type=int, default=9, help="turns (9)")
    add("--steps", type=int, default=16, help="steps of the runs of the part `ranks` (16)")
    add("--shared", help="folder with data/superni_sample and backbones/t5_mini_text (toy suite)")
    name = RESULTS / "step_time_cpu.json"
    add("--json", help=f"keep the figures here too, beside those of other parts (say {name.name})")
    return parser.parse_args(arguments)


def machine(setting: Setting) -> Row:
    """What the figures were measured on."""
    found = {
        "device": "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if setting.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(setting.device)
    return found


def keep(file: Path, found: Row) -> None:
    """Add the parts of this run to the file; each part keeps the machine's state of its own run."""
    whole: Row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for part in PARTS:
        if part in found:
            whole[part] = {"machine": found["machine"], "figures": found[part]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


# -- times -----------------------------------------------------------------------------------------


def time_ways(model: Any, setting: Setting, turns: int, names: Sequence[str] = ()) -> list[Row]:
    """Every way's medians, ratios to each of `BASES`, and counts."""
    is_causal = setting.model in CAUSAL_SHAPES
    wanted = {*names, *BASES[:2]} if names else None
    ways = (causal_ways if is_causal else all_ways)(model, setting, wanted)
    timed = {way.name for way in ways}
    bases = [name for name in (CAUSAL_BASES if is_causal else BASES) if name in timed]
    progress = Progress(len(ways) * (turns + 1), start=0, what=f"L {setting.tokens}", unit="pass")
    counts = {}
    for way in ways:
        way.step()
        counts[way.name] = counted(way, setting)
        progress.advance(way.name)
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for turn in range(turns):
        for way in ways[:: -1 if turn % 2 else 1]:
            gc.collect()
            gc.disable()
            times[way.name].append(one_pass(way, setting))
            gc.enable()
            progress.advance(way.name)
    progress.close()
    linears = max(way.n_linears for way in ways)
    return [
        {
            **{k: str(v) if k in ("dtype", "device") else v for k, v in asdict(setting).items()},
            "way": way.name,
            "linears": linears,
            "cpu_ms": 1e3 * statistics.median(cpu for cpu, _ in times[way.name]),
            "wall_ms": 1e3 * statistics.median(wall for _, wall in times[way.name]),
            "ratios": {base: ratio(times[way.name], times[base], setting) for base in bases},
            **counts[way.name],
        }
        for way in ways
    ]


def one_pass(way: Way, setting: Setting) -> tuple[float, float]:
    """Seconds of the process and of the clock. On a GPU the clock's alone mean something."""
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    way.step()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def ratio(
    mine: list[tuple[float, float]], base: list[tuple[float, float]], setting: Setting
) -> float:
    """Median over the turns of the ratio within a turn: CPU time, on a GPU the clock's."""
    clock = 1 if setting.device.type == "cuda" else 0
    return statistics.median(a[clock] / b[clock] for a, b in zip(mine, base, strict=True))


# -- logits ----------------------------------------------------------------------------------------


@torch.no_grad()
def logit_errors(model: Any, setting: Setting) -> list[Row]:
    """How far each switch moves the logits, and how far both are from those in float32.

    Relative norms. The weights are the same: those of a backbone in bfloat16.
    """
    batch = setting.batch()

    def logits(one: Any) -> Tensor:
        found: Tensor = one(**batch, use_cache=False).logits
        return found.double()

    whole = copy.deepcopy(model).float()
    rounded = model if model.dtype == torch.bfloat16 else copy.deepcopy(model).bfloat16()
    truth = logits(whole)
    rows = []
    for dtype, bare in (("float32", whole), ("bfloat16", rounded)):
        stock = logits(bare)
        for names in (*((name,) for name in SWITCHES), SWITCHES):
            fused = logits(fuse(bare, *names))
            rows.append(
                {
                    "dtype": dtype,
                    "switches": " ".join(names),
                    "to_stock": _relative(fused, stock),
                    "to_float32": _relative(fused, truth),
                    "stock_to_float32": _relative(stock, truth),
                }
            )
    return rows


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# -- tables ----------------------------------------------------------------------------------------


def to_markdown(found: Row) -> str:
    """All tables."""
    lines = []
    rows = found.get("steps", [])
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        lines += step_table([row for row in rows if row["tokens"] == tokens])
    if "optimizer" in found:
        lines += ["", "optimizer: " + json.dumps(found["optimizer"])]
    for part in ("logits", "ranks", "start"):
        lines += ["", *map(json.dumps, found.get(part, []))]
    lines.append("machine: " + json.dumps(found["machine"]))
    return "\n".join(lines)


def step_table(rows: list[Row]) -> list[str]:
    """One input length: times, ratios, memory, and what is added per linear and direction."""
    by_name = {row["way"]: row for row in rows}
    bases = [*rows[0]["ratios"]]
    lines = [
        "",
        f"| {rows[0]['rows']} x {rows[0]['tokens']} tokens | CPU ms | wall ms "
        f"| {' | '.join(bases)} | peak MiB | saved MiB "
        "| kernels per linear, forward, backward | waits |",
        "|---" * (len(bases) + 7) + "|",
    ]
    for row in rows:
        # ours runs over the fused backbone, the others over transformers' own
        is_ours = row["way"].startswith(("LoRA", "Poly", "MHR")) and "stock" not in row["way"]
        base = by_name["frozen fused" if is_ours else "frozen stock"]
        extra = [
            f"{(row[key] - base[key]) / row['linears']:.1f}"
            for key in ("forward_kernels", "backward_kernels")
        ]
        ratios = " | ".join(f"{row['ratios'][name]:.2f}" for name in bases)
        lines.append(
            f"| {row['way']} | {row['cpu_ms']:.0f} | {row['wall_ms']:.0f} | {ratios} "
            f"| {row['peak_mib']:.1f} | {row['saved_mib']:.1f} "
            f"| {'' if row['way'].startswith('frozen') else ', '.join(extra)} | {row['waits']} |"
        )
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
