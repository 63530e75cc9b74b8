"""The paper's claims at small scale, end to end: searches, seeds, tables, verdicts.

python launch/reproduce.py [toy|superni|all] [--workers 2] [--seeds 5] [--folder FOLDER] [--quick]
"""

import sys
from pathlib import Path

from mhr_scale.verbs.launching import guarded, imported

with imported():
    from reproduction.study import parse, reproduce

if __name__ == "__main__":
    guarded(lambda: reproduce(parse(sys.argv[1:], launch=Path(__file__).resolve().parent)))
