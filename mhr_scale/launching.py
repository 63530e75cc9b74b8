"""What every launch stub does: parse a recipe, run the verb, turn errors into exit codes.

Exit codes: 0 done, 2 a mistake of the user's (one line says which), anything else a defect.
"""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from mhr_scale.errors import UserError
from mhr_scale.recipe import parse, to_yaml
from mhr_scale.runlog import rank, start_logging

T = TypeVar("T")


def guarded(action: Callable[[], object]) -> NoReturn:
    """Run `action` and end the process; a mistake of the user's is one line and exit code 2."""
    start_logging()
    leave(_outcome(action))


def _outcome(action: Callable[[], object]) -> int:
    try:
        action()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End the process; under a launcher without tearing the interpreter down.

    A thread of gloo that drops its last tensor while Python finalises asks for the interpreter's
    lock, is ended in the middle of a destructor, and aborts the process ("terminate called without
    an active exception"): a finished run would end with an error, one time in some dozens.
    """
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(schema: type[T], verb: Callable[[T], object], *, usage: str) -> None:
    """Run `verb` on the recipe named on the command line, or print it under `--print`."""

    def action() -> None:
        command = parse(schema, sys.argv[1:], usage=usage)
        if not command.print_only:
            verb(command.config)
        elif rank() == 0:
            sys.stdout.write(to_yaml(command.config) + _ds_text(command.config))

    guarded(action)


def _ds_text(config: Any) -> str:
    """The dictionary DeepSpeed would get, as YAML comments; nothing where it gets none."""
    if getattr(config, "backbone", None) is None or not hasattr(config.run, "ds_config"):
        return ""
    import json

    from mhr_scale.engine import deepspeed_config, read_ds_config

    content = read_ds_config(config.run.ds_config)
    merged = json.dumps(deepspeed_config(content, dtype=config.backbone.dtype), indent=1)
    return "".join(f"# {line}\n" for line in ["DeepSpeed gets:", *merged.splitlines()])
