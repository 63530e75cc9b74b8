"""Everything that is to be proved and measured on a GPU, in one command of nine minutes.

python tests/gpu/accept.py [--only card steps] [--folder runs/gpu] [--minutes 9]
    on the GPU of this machine (80 GB or more): a table, and FOLDER/accept.json
python tests/gpu/accept.py --tiny
    the same code at toy sizes on the CPU, whose figures tell nothing
python tests/gpu/accept.py --rehearse A100-80G [--only t5]
    the measuring parts at their full shapes without a GPU: whether they run, and fit that card

Each part runs in a process of its own, so that a kernel that fails ends its part alone; `--tiny`
runs all in one. What is done stays done: the same command resumes where it was stopped and repeats
what failed. Another commit starts anew (so does `--fresh`).
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from board import Board, Entry, Scale, facts_of_machine, to_markdown

from mhr_scale.errors import ConfigError

HERE = Path(__file__).parent
#: A part that has not ended this long after its time is killed.
GRACE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Part:
    """A module with `measure(board, scale)`, and its share of the minutes."""

    module: str
    share: float
    about: str
    rehearsed: bool = False
    """Whether `--rehearse` knows it: it trains ways that take turns."""


PARTS = {
    "card": Part("part_card", 0.3, "rates of the card itself: products, memory, copies, launches"),
    "layers": Part("part_layers", 0.3, "adapted linears and every method, against stored numbers"),
    "models": Part("part_models", 0.8, "families in every form of a step, ranking, generation"),
    "runs": Part("part_runs", 1.6, "toy runs on CPU and device, resumed, deterministic, ZeRO-3"),
    "uses": Part("part_uses", 0.6, "8 and 4 bits, few-shot waves, PEFT folders, a real backbone"),
    "waits": Part("part_waits", 0.3, "waits of the host in a step, kernels of an adapted linear"),
    "t5": Part(
        "part_t5", 2.6, "steps at the shapes of T5-XXL, against the frozen one and PEFT", True
    ),
    "llama": Part("part_llama", 1.0, "the same at the shapes of Llama-8B", True),
    "waves": Part("part_waves", 0.8, "few-shot jobs in waves over T5-large and T5-XL", True),
    "answers": Part("part_answers", 0.6, "ranking and generating over T5-XXL and Llama-8B"),
    "plan": Part("part_plan", 0.7, "what `plan` predicts of these steps, and the rates it assumes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for and print the table; 0 if everything holds, else 1."""
    args = parse(arguments)
    if args.rehearse:
        known = [name for name, part in PARTS.items() if part.rehearsed]
        parts = {n: importlib.import_module(PARTS[n].module) for n in args.only or known}
        try:
            return int(importlib.import_module("rehearse").rehearse_all(parts, args.rehearse))
        except ConfigError as error:
            raise SystemExit(str(error)) from None
    scale = Scale.tiny() if args.tiny else Scale.full()
    folder = Path(args.folder or ("runs/gpu_tiny" if args.tiny else "runs/gpu"))
    board = Board.opened(folder, scale=scale, is_fresh=args.fresh)
    names = args.only or list(PARTS)
    if args.part:
        board.until = args.until
        measure(args.part, board, scale)
        return 0
    begun, total = time.time(), sum(PARTS[name].share for name in names)
    passed = 0.0
    for name in names:
        passed += PARTS[name].share
        until = begun + 60.0 * args.minutes * passed / total
        print(f"{name}: {PARTS[name].about}", file=sys.stderr, flush=True)
        if scale.is_tiny:
            board.until = until
            measure(name, board, scale)
        else:
            run_apart(name, args, folder, until)
            board.read_again()
    found = board.write(names, facts_of_machine(scale), seconds=time.time() - begun)
    print(to_markdown(found))
    print(f"\n{found['holds']} hold, {found['fails']} fail, {found['left']} not run; {board.file}")
    return int(bool(found["fails"] or found["left"]))


def measure(name: str, board: Board, scale: Scale) -> None:
    """Run one part in this process; what keeps it from starting is an entry too."""
    board.part = name
    try:
        importlib.import_module(PARTS[name].module).measure(board, scale)
    except Exception:
        board.keep_error("part")


def run_apart(name: str, args: argparse.Namespace, folder: Path, until: float) -> None:
    """Run one part in a process of its own, at most until its time is over."""
    command = [sys.executable, str(HERE / "accept.py"), "--part", name, "--until", str(until)]
    command += ["--folder", str(folder)]
    # blocks that can grow: ways of other shapes take turns in one process
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    process = psutil.Popen(command, env=environment)
    try:
        code = process.wait(timeout=until + GRACE_SECONDS - time.time())
        why = f"its process ended with code {code}" if code else ""
    except psutil.TimeoutExpired:
        for each in (*process.children(recursive=True), process):  # launches too
            each.kill()
        why = "it was killed: its time was over"
    if why:
        entry = Entry(part=name, name="part", error=why)
        Board.opened(folder, scale=Scale.full()).keep(entry)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="toy sizes on the CPU")
    add("--rehearse", metavar="CARD", help="a card of the table of `plan`; minutes, no figures")
    about = "; ".join(f"{name}: {part.about}" for name, part in PARTS.items())
    add("--only", nargs="+", choices=list(PARTS), help=f"these parts (all). {about}")
    add("--folder", help="where entries and accept.json go (runs/gpu, runs/gpu_tiny)")
    add("--minutes", type=float, default=9.0, help="for all of them together (9)")
    add("--fresh", action="store_true", help="forget what is done already")
    add("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    add("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.path[1:1] = [str(HERE.parent / "benchmarks"), str(HERE.parent)]
    sys.exit(main())
