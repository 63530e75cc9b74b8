"""What every launch stub does: parse a recipe, run the verb, turn errors into exit codes.

The codes are `errors.ExitCode`. An error that all ranks find is printed once, an error of one rank
by that rank. The rank that failed ends before those that only noticed, so that the launcher returns
its code.
"""

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any, NoReturn, TypeVar

from mhr_scale.errors import ExitCode, UserError
from mhr_scale.recipe.reading import parse, to_yaml
from mhr_scale.run import failures, stopping
from mhr_scale.run.runlog import log, rank, start_logging, world_size

T = TypeVar("T")

#: How long a rank waits for the launcher to end it because another rank reports the same error:
#: launchers poll once a second, and ranks may be seconds apart.
PATIENCE_SECONDS = 6.0
#: The same for a rank without an error of its own: longer than the failed one may wait to report.
FINE_PATIENCE_SECONDS = 15.0


def guarded(action: Callable[[], object]) -> NoReturn:
    """Run `action` and end the process; an error of the user is one line and exit code 2."""
    start_logging()
    with stopping.listening():
        code = _outcome(action)
    leave(code)


def _outcome(action: Callable[[], object]) -> int:
    """Run `action` and report what went wrong; returns the exit code."""
    try:
        action()
        return ExitCode.DONE
    except BaseException as error:
        with stopping.held():
            return _tell(error)


def _tell(error: BaseException) -> int:
    """Report what ended the run, unless another rank does; returns the exit code."""
    if isinstance(error, stopping.Stopped):
        failed = error.__context__
        if isinstance(failed, UserError | RuntimeError):  # it was failing when asked to stop
            return _tell(failed)
        log.info("%s", error)
        return ExitCode.AGAIN
    if isinstance(error, SystemExit | KeyboardInterrupt):
        raise error
    explained = failures.explain(error)
    if isinstance(error, UserError):
        explained = failures.Explained(str(error))
    if explained is None:
        sys.stderr.write(_of_this_rank("".join(traceback.format_exception(error))))
        return ExitCode.DEFECT
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0" or stopping.is_asked()
    if explained.code == ExitCode.ANOTHER_RANK:
        stopping.wait_asked(FINE_PATIENCE_SECONDS)
        log.error("%s", _of_this_rank(explained.text + notes))
    elif is_first or not stopping.wait_asked(PATIENCE_SECONDS):
        line = f"error: {explained.text}{notes}\n"
        sys.stderr.write(line if rank() == 0 else _of_this_rank(line))
    return explained.code


def _of_this_rank(text: str) -> str:
    return f"rank {rank()}: {text}" if world_size() > 1 else text


def leave(code: int) -> NoReturn:
    """End the process; under a launcher without tearing the interpreter down.

    A gloo thread that drops its last tensor while Python finalises waits for the interpreter's
    lock, is ended in the middle of a destructor, and aborts the process ("terminate called without
    an active exception"): once in some dozens of times, a finished run would end with an error.
    """
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(schema: type[T], verb: Callable[[T], object], *, about: str) -> NoReturn:
    """Run `verb` on the recipe named on the command line, or print it under `--print`."""

    def action() -> None:
        command = parse(schema, sys.argv[1:], about=about)
        if not command.print_only:
            verb(command.config)
        elif rank() == 0:
            _print(lambda: to_yaml(command.config) + _ds_text(command.config))

    guarded(action)


def main_of_words(verb: Callable[[Sequence[str]], str]) -> NoReturn:
    """Run a verb that parses the command line itself, and print the text it returns."""
    guarded(lambda: _print(lambda: verb(sys.argv[1:])))


def _print(make: Callable[[], str]) -> None:
    """Print what `make` returns; what libraries print meanwhile goes to stderr."""
    with redirect_stdout(sys.stderr):
        text = make()
    sys.stdout.write(text)


def _ds_text(config: Any) -> str:
    """DeepSpeed's merged configuration as YAML comments; empty for verbs without a backbone."""
    run = getattr(config, "run", None)
    if getattr(config, "backbone", None) is None or not hasattr(run, "ds_config"):
        return ""
    import json

    from mhr_scale.engine.ds_config import deepspeed_config, read_ds_config

    content = read_ds_config(config.run.ds_config)
    merged = json.dumps(deepspeed_config(content, dtype=config.backbone.dtype), indent=1)
    return "".join(f"# {line}\n" for line in ["DeepSpeed gets:", *merged.splitlines()])
