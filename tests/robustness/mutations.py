"""Damaged inputs against every reader: no raw traceback, no hang, no half-written result.

    python tests/robustness/mutations.py --cases 2000 --seed 0
    python tests/robustness/mutations.py --kind adapter --seed 0 --case 17     one case again

A case is a copy of a valid input with one file damaged (sometimes two), drawn from the seed, the
kind and the case's number; then the code of the verbs reads it. It ends well (the damage was
harmless), or with one line that names the file or the setting. Anything else is a finding, and
the program ends with code 1.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "verbs"), str(TESTS.parent)]
os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
from cases import FINDINGS, HARMLESS, REFUSED, Outcome, run_case  # noqa: E402
from doors import KINDS  # noqa: E402
from originals import Originals  # noqa: E402


def main() -> int:
    """Run the cases asked for; 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), help="this kind alone")
    parser.add_argument("--case", type=int, help="the case of this number alone; its files stay")
    options = parser.parse_args()
    kinds = [options.kind] if options.kind else list(KINDS)
    torch.set_num_threads(1)
    logging.getLogger("mhr_scale").addHandler(logging.NullHandler())
    logging.getLogger("mhr_scale").propagate = False
    root = Path(tempfile.mkdtemp(prefix="mutations_"))
    originals = Originals(root / "originals")
    outcomes: list[Outcome] = []
    for name in kinds:
        share = -(-options.cases // len(kinds))
        numbers = range(share) if options.case is None else [options.case]
        keep = options.case is not None
        for number in numbers:
            work = root / "work" / name.replace(" ", "_")
            outcome = run_case(name, originals, work, seed=options.seed, number=number, keep=keep)
            outcomes.append(outcome)
            if outcome.is_finding or keep:
                print(outcome, flush=True)
        print(f"{name}: {len(numbers)} cases", file=sys.stderr)
    if options.case is not None:
        print(f"its files are in {root / 'work'}")
        return 0
    print(table(outcomes))
    return int(any(outcome.is_finding for outcome in outcomes))


def table(outcomes: Sequence[Outcome]) -> str:
    """Outcomes by kind, the slowest case and the longest message."""
    labels = (HARMLESS, REFUSED, *FINDINGS)
    width = max(len(outcome.kind) for outcome in outcomes)
    lines = [f"{'':{width}}" + "".join(f"{label:>15}" for label in labels) + f"{'slowest':>9}"]
    for name in dict.fromkeys(outcome.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kind == name]
        counts = Counter(outcome.label for outcome in own)
        slowest = max(outcome.seconds for outcome in own)
        line = "".join(f"{counts[label]:15}" for label in labels)
        lines.append(f"{name:{width}}{line}{slowest:7.1f} s")
    counts = Counter(outcome.label for outcome in outcomes)
    lines.append(f"{'all':{width}}" + "".join(f"{counts[label]:15}" for label in labels))
    longest = max(outcomes, key=lambda outcome: len(outcome.message) * (not outcome.is_finding))
    return "\n".join([*lines, f"longest message: {longest.message}"])


if __name__ == "__main__":
    begun = time.monotonic()
    code = main()
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(code)
