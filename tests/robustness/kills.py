"""Runs and saves that are killed at random moments, and what is left of them.

    python tests/robustness/kills.py --kills 30 --seed 0
    python tests/robustness/kills.py --kills 8 --verbs pretrain adapt --ranks 1 2 1 --minutes 5
    python tests/robustness/kills.py --saves 50

A run is killed some times (one rank, the launcher or all of them; by SIGKILL, now and then by
SIGTERM) and started again each time, on the next number of ranks, until it is finished; then its
adapters, scores and metrics must be those of a run that nobody has killed, to the bit, and nobody
may be left. Saves are killed in forks (`killed_saves.py`). Ends with code 1 if anything is wrong.
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "robustness"), str(TESTS.parent)]
os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

from killed_saves import SCENES, kill_at  # noqa: E402
from killed_verbs import PLACEMENTS, VERBS, Verb  # noqa: E402
from killing import Launch, Moment, launch  # noqa: E402

#: Kills of one run before it may come to its end.
KILLS_PER_RUN = 3
#: How much longer two ranks take than one process.
SLOWER = 2.5


@dataclass(slots=True)
class Reference:
    """A run of a verb that nobody kills, and what it took."""

    verb: Verb
    source: Path
    folder: Path
    lines: int
    seconds: float


@dataclass(slots=True)
class Killed:
    """A run of a verb that was killed, and what is wrong with it."""

    verb: str
    kills: list[str] = field(default_factory=list)
    launches: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Kill what is asked for, print a table; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="of runs, over all verbs")
    parser.add_argument("--saves", type=int, default=0, help="kills amid a save")
    parser.add_argument("--verbs", nargs="+", choices=list(VERBS), default=list(VERBS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 1], help="in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="no new kill after so long")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kills_") as name:
        faults = kill_saves(Path(name), options.saves, options.seed) if options.saves else 0
        runs = kill_runs(Path(name), options) if options.kills else []
    if runs:
        print(table(runs, options.kills))
    return int(bool(faults or any(run.faults for run in runs)))


# -- runs ------------------------------------------------------------------------------------------


def kill_runs(folder: Path, options: argparse.Namespace) -> list[Killed]:
    """Kill and finish runs of all verbs in turn until there were so many kills."""
    end = time.monotonic() + 60 * options.minutes
    references = make_references(folder, options.verbs)
    ranks, runs = itertools.cycle(options.ranks), list[Killed]()
    for number, verb in enumerate(itertools.cycle(options.verbs)):
        left = options.kills - sum(len(run.kills) for run in runs)
        if left <= 0 or time.monotonic() > end:
            return runs
        draw = random.Random(f"{options.seed} {number}")
        own = folder / "runs" / str(number) / "run"
        run = kill_run(
            references[verb], own, kills=min(left, KILLS_PER_RUN), ranks=ranks, draw=draw, end=end
        )
        runs.append(run)
        print(f"{verb}: {'; '.join(run.kills)}: {'; '.join(run.faults) or 'equal'}", flush=True)
    return runs


def make_references(folder: Path, names: Sequence[str]) -> dict[str, Reference]:
    """Runs of these verbs that nobody kills; they start from a pre-trained one."""
    references: dict[str, Reference] = {}
    for name in dict.fromkeys(("pretrain", *names)):
        verb, own = VERBS[name], folder / "whole" / name / "run"
        source = own if name == "pretrain" else references["pretrain"].folder
        done = launch(
            verb.script,
            verb.arguments(source, own),
            own,
            ranks=1,
            count_lines=lambda verb=verb, own=own: verb.count_lines(own),  # type: ignore[misc]
        )
        if done.faults:
            raise SystemExit(f"{name}, killed by nobody: {'; '.join(done.faults)}")
        references[name] = Reference(verb, source, own, verb.count_lines(own), done.seconds)
    return references


def kill_run(
    reference: Reference,
    folder: Path,
    *,
    kills: int,
    ranks: Iterator[int],
    draw: random.Random,
    end: float = float("inf"),
) -> Killed:
    """Start a run again and again, killed so many times if it lives long enough, and compare."""
    verb, run = reference.verb, Killed(reference.verb.name)
    is_finished = False
    while not is_finished and not run.faults:
        size = next(ranks)
        moment = None
        if len(run.kills) < kills and time.monotonic() < end:
            moment = draw_moment(reference, folder, size, draw)
        done = start_again(reference, folder, size, moment, draw)
        run.launches += 1
        run.kills += [done.kill] if done.kill else []
        run.faults += done.faults
        is_finished = done.is_finished
    if not run.faults:
        run.faults += verb.differences(folder, reference.folder)
    return run


def draw_moment(reference: Reference, folder: Path, ranks: int, draw: random.Random) -> Moment:
    """After some share of the time a start takes, or at one of the lines that are to come."""
    if draw.random() < 0.3:
        seconds = reference.seconds * (SLOWER if ranks > 1 else 1.0)
        return Moment(seconds=draw.uniform(0.0, seconds))
    there = reference.verb.count_lines(folder)
    line = draw.randint(min(there + 1, reference.lines), reference.lines)
    return Moment(lines=line, in_save=reference.verb.saves and draw.random() < 0.4)


def start_again(
    reference: Reference, folder: Path, ranks: int, moment: Moment | None, draw: random.Random
) -> Launch:
    """One start of a run, on so many ranks, replicated or sharded."""
    verb = reference.verb
    placement = draw.choice(PLACEMENTS) if ranks > 1 else "null"
    return launch(
        verb.script,
        verb.arguments(reference.source, folder, placement),
        folder,
        ranks=ranks,
        count_lines=lambda: verb.count_lines(folder),
        moment=moment,
        draw=draw,
    )


def table(runs: Sequence[Killed], asked: int) -> str:
    """Kills, starts and equal runs by verb."""
    lines = [f"{'verb':10} {'runs':>5} {'kills':>6} {'starts again':>13} {'equal':>6}"]
    for name in dict.fromkeys(run.verb for run in runs):
        own = [run for run in runs if run.verb == name]
        kills, launches = sum(len(r.kills) for r in own), sum(r.launches for r in own)
        equal = sum(not r.faults for r in own)
        again = launches - len(own)
        lines.append(f"{name:10} {len(own):5} {kills:6} {again:13} {equal:6}")
    kills = sum(len(run.kills) for run in runs)
    faults = sum(bool(run.faults) for run in runs)
    return "\n".join([*lines, f"{kills} of {asked} kills, {len(runs)} runs, {faults} not equal"])


# -- saves -----------------------------------------------------------------------------------------


def kill_saves(folder: Path, kills: int, seed: int) -> int:
    """Kill saves at random moments, and print how many left no state to load."""
    import torch

    torch.set_num_threads(1)
    draw, faults, done = random.Random(seed), 0, 0
    while done < kills:
        scene, point = draw.choice(SCENES), draw.randint(1, 80)
        was_killed, wrong = kill_at(scene, folder / f"save_{done}_{point}", point)
        if not was_killed and not wrong:
            continue  # it has fewer points than that
        done += 1
        faults += bool(wrong)
        if wrong:
            print(f"{scene.name}, killed at point {point}: {'; '.join(wrong)}", flush=True)
    print(f"{kills} saves killed, {kills - faults} left a state to load and go on from")
    return faults


if __name__ == "__main__":
    sys.exit(main())
