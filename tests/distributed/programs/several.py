"""Commands one after the other in one launch: `several.py FILE`.

FILE is a JSON list of ports and command lines, each a launch script and its arguments. Each runs
from its script; the first that fails ends the launch with its exit code. Each has a port of its
own, lest a rank that is ahead joins the last command's group.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from mhr_scale.verbs import launching

leave = launching.leave


def end_script(code):
    """Instead of the process, which other scripts still need."""
    raise SystemExit(code)


launching.leave = end_script
file = next(word for word in sys.argv[1:] if not word.startswith("--local_rank"))
for port, command in json.loads(Path(file).read_text()):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            leave(end.code)
leave(0)
