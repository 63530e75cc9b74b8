"""Everything that is to be proved and measured on a GPU, in one command of nine minutes.

python tests/gpu/accept.py [--only card steps] [--folder runs/gpu] [--minutes 9]
    on the GPU of this machine (80 GB or more): a table, and FOLDER/accept.json
python tests/gpu/accept.py --tiny
    the same code at toy sizes on the CPU, whose figures tell nothing

Each part runs in a process of its own, so that a kernel that fails ends its part alone; `--tiny`
runs all in one. What is done stays done: the same command resumes where it was stopped and repeats
what failed. Another commit starts anew (so does `--fresh`).
"""

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from board import Board, Entry, Scale, facts_of_machine, to_markdown

HERE = Path(__file__).parent
#: A part that has not ended this long after its time is killed.
GRACE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Part:
    """A module with `measure(board, scale)`, and its share of the minutes."""

    module: str
    share: float
    about: str


PARTS = {
    "card": Part("part_card", 0.3, "rates of the card itself: products, memory, copies, launches"),
    "waits": Part("part_waits", 0.3, "waits of the host in a step, kernels of an adapted linear"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for and print the table; 0 if everything holds, else 1."""
    args = parse(arguments)
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
    try:
        ended = subprocess.run(command, timeout=until + GRACE_SECONDS - time.time(), check=False)
        why = f"its process ended with code {ended.returncode}" if ended.returncode else ""
    except subprocess.TimeoutExpired:
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
