"""Two launches of the same verb at once: into one folder, or at one port.

    python tests/robustness/concurrent_launches.py --times 10
    python tests/robustness/concurrent_launches.py --times 10 --verbs pretrain evaluate --ranks 2
    python tests/robustness/concurrent_launches.py --times 10 --port

Into one folder: one of the two ends well and leaves, to the bit, what a launch alone leaves; the
other ends with code 2 and a line that names the first. At one port, into two folders: the same, but
for the line, which names the port or the other launch. Where the second comes when the first has
left, both end well and right. Ends with code 1 if anything else happened.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "robustness"), str(TESTS.parent)]
os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

from killed_verbs import VERBS  # noqa: E402
from processes import finish, free_port, start, succeed  # noqa: E402

LIMIT_SECONDS = 400.0
#: What the one says that leaves.
REFUSALS = ("in use by process", "is not empty")
PORT_REFUSALS = ("is in use, by another launch", "is of another launch")
#: Files that tell when, where and by which command.
OF_THE_START = ("provenance.json", "config.yaml", "export.yaml", "average.yaml", "metrics.jsonl")


@dataclass(frozen=True, slots=True)
class Launched:
    """How a launch ended, and after how long."""

    code: int
    output: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Case:
    """A verb's script, and its command line for a folder."""

    script: str
    arguments: Callable[[Path, Path], tuple[str, ...]]
    """From the folder of a pre-trained run and the folder to write."""
    ranks: bool = True


def _of_runs(name: str) -> Case:
    return Case(VERBS[name].script, lambda source, folder: VERBS[name].arguments(source, folder))


CASES = {
    **{name: _of_runs(name) for name in VERBS},
    "analyse": Case(
        "launch/analyse.py",
        lambda source, folder: (
            "launch/recipes/toy_analyse.yaml",
            f"adapter={source}",
            f"run.folder={folder}",
        ),
    ),
    "export": Case(
        "launch/export.py",
        lambda source, folder: (
            "launch/recipes/toy_export.yaml",
            f"adapter={source}",
            f"folder={folder}",
        ),
        ranks=False,
    ),
    "convert": Case(
        "launch/convert.py",
        lambda source, folder: ("launch/recipes/toy_convert.yaml", f"folder={folder}"),
        ranks=False,
    ),
    "finetune": Case(
        "launch/finetune.py",
        lambda source, folder: (
            "launch/recipes/toy_finetune.yaml",
            f"adapter={source.parent / 'exported'}",
            f"run.folder={folder}",
            "protocol.steps=20",
        ),
        ranks=False,
    ),
}


def main() -> int:
    """Start pairs of every verb, print what happened; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10, help="pairs of every verb")
    parser.add_argument("--verbs", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ranks", type=int, default=1, help="of every launch")
    parser.add_argument("--port", action="store_true", help="two folders, one port")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, faults = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="concurrent_") as name:
        place = Path(name)
        source = make_source(place, options.verbs)
        for verb in ["pretrain"] if options.port else options.verbs:
            ranks = 2 if options.port else options.ranks if CASES[verb].ranks else 1
            whole = place / "whole" / verb / "run"  # the name is stored in what is written
            alone = succeed(CASES[verb].script, *CASES[verb].arguments(source, whole))
            assert alone is not None
            for number in range(options.times):
                folder = place / "pairs" / f"{verb}_{number}" / "run"
                wait = draw.uniform(0.0, 4.0 if options.port else 1.0)
                port = free_port() if options.port else None
                found = pair(CASES[verb], source, folder, whole, ranks=ranks, wait=wait, port=port)
                faults += len(found)
                print(f"{verb} {number}, {wait:.1f} s apart: {found or 'as it should be'}")
                sys.stdout.flush()
    return int(bool(faults))


def make_source(place: Path, verbs: list[str]) -> Path:
    """The pre-trained run that the others read, and its export where it is needed."""
    source = place / "source"
    succeed(VERBS["pretrain"].script, *VERBS["pretrain"].arguments(place, source))
    if "finetune" in verbs:
        exported = CASES["export"].arguments(source, place / "exported")
        succeed("launch/export.py", *exported)
    return source


def pair(
    case: Case,
    source: Path,
    folder: Path,
    whole: Path,
    *,
    ranks: int,
    wait: float,
    port: int | None = None,
) -> list[str]:
    """Start two launches `wait` seconds apart; returns what is not as it should be.

    With a port, both are at it and the second one has a folder of its own.
    """
    folders = [folder, folder.parent / "second" / "run" if port else folder]
    launcher: tuple[str, ...] = ()
    if port is not None:
        launcher = ("deepspeed", "--num_gpus", str(ranks), "--master_port", str(port))
    processes, begun = [], time.monotonic()
    for number, place in enumerate(folders):
        time.sleep(wait * number)
        words = case.arguments(source, place)
        count = 0 if ranks == 1 else ranks
        processes.append(start(case.script, *words, ranks=count, launcher=launcher))
    ended = []
    for process in processes:
        done = finish(process, LIMIT_SECONDS)
        ended.append(Launched(done.returncode, done.stdout, time.monotonic() - begun))
    faults = faults_of(ended, PORT_REFUSALS if port else REFUSALS)
    if not faults:
        right = [place for one, place in zip(ended, folders, strict=True) if one.code == 0]
        faults = [fault for place in right for fault in differences(place, whole)]
    for place in folders:
        shutil.rmtree(place, ignore_errors=True)
    return faults


def faults_of(ended: list[Launched], refusals: tuple[str, ...]) -> list[str]:
    """What is wrong with the ends of two launches, if anything."""
    if all(one.code == 0 for one in ended):  # the second came when the first had left
        return []
    if sorted(one.code for one in ended) != [0, 2]:
        tails = [one.output.strip().splitlines()[-1:] for one in ended]
        return [f"codes {[one.code for one in ended]}, last lines {tails}"]
    refused = next(one for one in ended if one.code == 2)
    faults = []
    if "Traceback" in refused.output:
        faults.append("a traceback")
    if not any(words in refused.output for words in refusals):
        faults.append(f"refused with other words: {refused.output.strip().splitlines()[-1]}")
    return faults


def differences(folder: Path, whole: Path) -> list[str]:
    """Files that are not, to the bit, as a launch alone leaves them."""
    mine, theirs = _files(folder), _files(whole)
    faults = [f"{name} is there once" for name in sorted(mine.keys() ^ theirs.keys())]
    shared = sorted(mine.keys() & theirs.keys())
    return faults + [f"{name} differs" for name in shared if mine[name] != theirs[name]]


def _files(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without what names folders and times."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.is_file() and file.name not in OF_THE_START:
            found[name] = file.read_bytes().replace(str(folder).encode(), b"FOLDER")
    return found


if __name__ == "__main__":
    sys.exit(main())
