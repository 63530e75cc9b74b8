"""The verb `harness`: lm-evaluation-harness's own command, which knows the model `mhr_scale`.

The harness looks models up in a table of its own and reads no entry points: its own `lm_eval`
would not find ours. Another program imports `mhr_scale.exchange.harness` first.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO

from mhr_scale.run import extras

ABOUT = """mhr_scale harness ARGUMENTS: all arguments are those of lm_eval, which follow. The model:
    --model mhr_scale --model_args adapter=RUN,task=NAME

"""


def run_harness(words: Sequence[str]) -> str:
    """Run `lm_eval` with these arguments, and return what it prints: its tables, its help.

    Raises `ConfigError` without lm-evaluation-harness.
    """
    extras.check("lm_eval", what="mhr_scale harness")
    from lm_eval.__main__ import cli_evaluate

    from mhr_scale.exchange import harness  # noqa: F401 - puts the model into its table

    about = ABOUT if {"-h", "--help"} & set(words[:1]) else ""
    printed, own = StringIO(), sys.argv
    sys.argv = ["lm_eval", *words]
    try:
        with redirect_stdout(printed):
            cli_evaluate()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = own
    return about + printed.getvalue()
