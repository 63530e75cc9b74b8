"""The helper modules of the tests on the path."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "verbs"), str(TESTS / "robustness")]
