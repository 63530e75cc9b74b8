"""The verb `harness` where lm-evaluation-harness is not installed."""

import sys

import pytest

from mhr_scale.errors import ConfigError
from mhr_scale.verbs.harness import run_harness


def test_one_line_says_how_to_have_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r'pip install "mhr_scale\[lm-eval\]"'):
        run_harness(["--model", "mhr_scale"])
