"""Verbs under bad circumstances: limits of memory, files and disks, other locales, broken pipes.

    python tests/robustness/circumstances.py --times 20 --seed 0
    python tests/robustness/circumstances.py --only memory disk --verbs pretrain

Each try runs a short verb under one circumstance, drawn at random. It has to end well, or with code
2 and one line that says what happened; never with a traceback, and never hang. After a circumstance
that ended it, the same command without it has to end well, and to leave what an undisturbed run
leaves. Ends with code 1 if anything else happened. Small disks need root.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "robustness"), str(TESTS.parent)]
os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

from concurrent_launches import CASES, differences, make_source  # noqa: E402
from processes import ROOT, succeed  # noqa: E402

LIMIT_SECONDS = 240.0
#: How a shell tells that a program's reader had left: by a signal, or by code.
BROKEN_PIPE = (141, 1)


@dataclass(frozen=True, slots=True)
class Circumstance:
    """What goes before and after a command in a shell, and the environment."""

    before: str = ""
    after: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    codes: tuple[int, ...] = (0, 2)


def memory(draw: random.Random) -> Circumstance:
    """Less address space than a start takes, or little more."""
    return Circumstance(before=f"ulimit -v {draw.randrange(300, 5000) * 1024}; ")


def file_size(draw: random.Random) -> Circumstance:
    """Files may not grow beyond some kilobytes."""
    return Circumstance(before=f"ulimit -f {draw.choice([0, 1, 4, 16, 64, 256])}; ")


def open_files(draw: random.Random) -> Circumstance:
    """Few open files."""
    return Circumstance(before=f"ulimit -n {draw.choice([8, 12, 16, 24, 32, 64])}; ")


def processes(draw: random.Random) -> Circumstance:
    """No new thread; root is not bound by it."""
    return Circumstance(before=f"ulimit -u {draw.choice([1, 4, 16])}; ")


def locale(draw: random.Random) -> Circumstance:
    """A terminal of ASCII alone."""
    names = {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": draw.choice(["C", "POSIX"])}
    return Circumstance(environment={**names, "PYTHONUTF8": draw.choice("01")}, codes=(0,))


def pipe(draw: random.Random) -> Circumstance:
    """A reader that leaves early, of the results or of everything."""
    before = "set -o pipefail; "
    return draw.choice(
        [
            Circumstance(before, " | head -c 1 > /dev/null", codes=(0, *BROKEN_PIPE)),
            Circumstance(before, " 2>&1 | head -c 1 > /dev/null", codes=(0, *BROKEN_PIPE)),
        ]
    )


def closed(draw: random.Random) -> Circumstance:
    """No standard output, error or input at all."""
    return Circumstance(after=draw.choice([" >&-", " 2>&-", " <&-", " >&- 2>&-"]), codes=(0, 2))


def full_device(draw: random.Random) -> Circumstance:
    """An output that is full."""
    return Circumstance(after=draw.choice([" > /dev/full", " 2> /dev/full"]), codes=(0, 1, 2))


def without_git(draw: random.Random) -> Circumstance:
    """A machine without git."""
    return Circumstance(environment={"PATH": "/nowhere"}, codes=(0,))


def disk(draw: random.Random) -> Circumstance:
    """A disk of some kilobytes, mounted by `small_disk`."""
    return Circumstance()


CIRCUMSTANCES: dict[str, Callable[[random.Random], Circumstance]] = {
    "memory": memory,
    "file size": file_size,
    "open files": open_files,
    "processes": processes,
    "locale": locale,
    "pipe": pipe,
    "closed": closed,
    "full output": full_device,
    "no git": without_git,
    "disk": disk,
}


def main() -> int:
    """Try what is asked for, print what happened; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--verbs", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=list(CIRCUMSTANCES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = options.only or [n for n in CIRCUMSTANCES if n != "disk" or not os.geteuid()]
    n_faults = 0
    with tempfile.TemporaryDirectory(prefix="circumstances_") as name:
        place = Path(name)
        source, wholes = make_source(place, options.verbs), dict[str, Path]()
        for number in range(options.times):
            draw = random.Random(f"{options.seed} {number}")
            verb, what = draw.choice(options.verbs), names[number % len(names)]
            case = CASES[verb]
            if verb not in wholes:
                wholes[verb] = place / "whole" / verb / "run"
                succeed(case.script, *case.arguments(source, wholes[verb]))
            own = place / "tries" / str(number)
            with small_disk(own, draw) if what == "disk" else plain_folder(own):
                words = (case.script, *case.arguments(source, own / "run"))
                found = attempt(words, CIRCUMSTANCES[what](draw))
            print(f"{number} {verb}, {what}: {found or 'as it should be'}", flush=True)
            if what != "disk" and not found:
                found = go_on(words, own / "run", wholes[verb])
                if found:
                    print(f"{number} {verb}, afterwards: {found}", flush=True)
            n_faults += bool(found)
    return int(bool(n_faults))


@contextmanager
def plain_folder(folder: Path) -> Iterator[None]:
    """An ordinary folder to run in."""
    folder.mkdir(parents=True)
    yield


@contextmanager
def small_disk(folder: Path, draw: random.Random) -> Iterator[None]:
    """A disk of its own for a folder, in memory."""
    folder.mkdir(parents=True)
    size = f"size={draw.choice([4, 16, 64, 256, 1024])}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def attempt(words: tuple[str, ...], circumstance: Circumstance) -> str:
    """Run a command under a circumstance; returns what is wrong with its end, or nothing."""
    command = shlex.join([sys.executable, *words])
    line = f"{circumstance.before}{command}{circumstance.after}"
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", line],
            cwd=ROOT,
            env={**os.environ, **circumstance.environment},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"hangs: {line}"
    output = (done.stdout + done.stderr).strip()
    if done.returncode not in circumstance.codes:
        return f"code {done.returncode}: {line}\n{output[-1500:]}"
    if "Traceback" in output:
        return f"a traceback: {line}\n{output[-1500:]}"
    if done.returncode == 2 and "2>" not in circumstance.after and "error: " not in output:
        return f"no word of why: {line}\n{output[-1500:]}"
    return ""


def go_on(words: tuple[str, ...], folder: Path, whole: Path) -> str:
    """Run the same command undisturbed, unless it was finished; returns what is wrong."""
    is_new = not words[0].endswith(("export.py", "convert.py")) or not folder.exists()
    found = attempt(words, Circumstance(codes=(0,))) if is_new else ""
    return found or "; ".join(differences(folder, whole))


if __name__ == "__main__":
    sys.exit(main())
