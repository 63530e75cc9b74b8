"""What every launch does: parse a recipe, run the verb, turn errors into exit codes.

The codes are `errors.ExitCode`. Results go to standard output by `streams.write_result`, all else
to standard error. An error that all ranks find is printed once, an error of one rank by that rank.
The rank that failed ends before those that only noticed, so that the launcher returns its code.
"""

import atexit
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pkgutil import resolve_name
from typing import Any, NoReturn, TypeVar

from mhr_scale.errors import EngineError, ExitCode, UserError
from mhr_scale.recipe.reading import page_of, parse, to_yaml
from mhr_scale.recipe.settings import settings_of
from mhr_scale.run import failures, launch_environment, stopping, streams, tables
from mhr_scale.run.runlog import log, rank, start_logging, world_size

T = TypeVar("T")

#: How long a rank waits for the launcher to end it because another rank reports the same error:
#: launchers poll once a second, and ranks may be seconds apart.
PATIENCE_SECONDS = 6.0
#: The same for a rank without an error of its own: longer than the failed one may wait to report.
FINE_PATIENCE_SECONDS = 15.0


@contextmanager
def imported() -> Iterator[None]:
    """Import what a recipe may say; where memory is too little for that, one line says so."""
    try:
        failures.check_address_space()
        yield
    except (EngineError, ImportError, MemoryError) as error:
        explained = failures.explain(error)
        if explained is None:
            raise
        sys.stderr.write(f"error: {explained.text}\n")
        raise SystemExit(explained.code) from None


def later(name: str) -> Callable[[Any], Any]:
    """A verb by its `module:function` in this room, which is imported when it is called.

    By then the recipe has been read: help and errors of a recipe need neither torch nor DeepSpeed.
    """

    def verb(argument: Any) -> Any:
        failures.check_address_space()
        return resolve_name(f"{__package__}.{name}")(argument)

    return verb


def guarded(action: Callable[[], object], *, settings: Collection[str] = ()) -> NoReturn:
    """Run `action` and end the process; an error of the user is one line and exit code 2.

    `settings` are those that the user may change.
    """
    with streams.opened():
        leave(_outcome_of_launch(action, settings))


def _outcome_of_launch(action: Callable[[], object], settings: Collection[str]) -> int:
    """Listen to signals while `action` runs; returns the exit code."""
    try:
        launch_environment.check()
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")  # the log asks for the rank
        return ExitCode.MISTAKE
    start_logging()
    with suppress(RuntimeError, ValueError, OSError):  # nobody reads stderr
        faulthandler.enable()  # a mapped file that is cut ends the process where it is read
    try:
        with stopping.listening():
            return _outcome(action, settings)
    except RuntimeError as error:  # no thread to listen with
        return _tell(error, settings)


def _outcome(action: Callable[[], object], settings: Collection[str] = ()) -> int:
    """Run `action` and report what went wrong; returns the exit code."""
    try:
        action()
        lost = streams.lost_result()
        if lost is not None and not streams.is_unread(lost):
            raise lost
        return ExitCode.DONE if lost is None else ExitCode.UNREAD
    except BaseException as error:
        with stopping.held():
            return _tell(error, settings)


def _tell(error: BaseException, settings: Collection[str]) -> int:
    """Report what ended the run, unless another rank does; returns the exit code."""
    if isinstance(error, stopping.Stopped):
        failed = error.__context__
        if isinstance(failed, UserError | RuntimeError):  # it was failing when asked to stop
            return _tell(failed, settings)
        log.info("%s", error)
        return ExitCode.AGAIN
    if isinstance(error, SystemExit | KeyboardInterrupt):
        raise error
    explained = failures.explain(error, settings)
    if explained is None:
        log.error("%s", _of_this_rank("".join(traceback.format_exception(error)).rstrip()))
        return ExitCode.DEFECT
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0" or stopping.is_asked()
    if explained.code == ExitCode.ANOTHER_RANK:
        stopping.wait_asked(FINE_PATIENCE_SECONDS)
        log.error("%s", _of_this_rank(explained.text + notes))
    elif is_first or not stopping.wait_asked(PATIENCE_SECONDS):
        line = f"error: {explained.text}{notes}"
        log.error("%s", line if rank() == 0 else _of_this_rank(line))
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
    sys.stderr.flush()
    os._exit(code)


def main(
    schema: type[T],
    verb: Callable[[T], object],
    *,
    about: str,
    words: Sequence[str] | None = None,
    has_tables: bool = False,
) -> NoReturn:
    """Run `verb` on the recipe named on the command line, or print it under `--print`.

    `words` are those of the command line that follow the verb, by default all. A verb that
    `has_tables` prints them as `--format` says.
    """
    argv = sys.argv[1:] if words is None else words

    def action() -> None:
        words, name = take_format(argv) if has_tables else (argv, "text")
        page = page_of(schema, words, about=about)
        if page is None:
            command = parse(schema, words, about=about)
            if not command.print_only:
                with tables.printed_as(name):
                    verb(command.config)
                return
            page = to_yaml(command.config) + _ds_text(command.config)
        if rank() == 0:
            streams.write_result(page)

    guarded(action, settings=settings_of(schema))


def main_of_words(
    verb: Callable[[Sequence[str]], str], *, words: Sequence[str], has_tables: bool = False
) -> NoReturn:
    """Run a verb that parses the command line itself, and print the text it returns.

    Only rank 0 works; other processes of a launcher return at once.
    """

    def action() -> None:
        rest, name = take_format(words) if has_tables else (words, "text")
        if rank() == 0:
            with tables.printed_as(name):
                streams.write_result(verb(rest))

    guarded(action)


def take_format(argv: Sequence[str]) -> tuple[list[str], str]:
    """A command line without its `--format NAME`, or `--format=NAME`, and the name."""
    words: list[str] = []
    found = "text"
    rest = iter(argv)
    for word in rest:
        option, _, name = word.partition("=")
        if option == "--format":
            found = name or next(rest, "")
        else:
            words.append(word)
    return words, found


def _ds_text(config: Any) -> str:
    """DeepSpeed's merged configuration as YAML comments; empty for verbs without a backbone."""
    run = getattr(config, "run", None)
    if getattr(config, "backbone", None) is None or not hasattr(run, "ds_config"):
        return ""
    import json

    from mhr_scale.engine.ds_config import deepspeed_config, read_ds_config

    content = read_ds_config(config.run.ds_config, asks_deepspeed=False)
    merged = json.dumps(deepspeed_config(content, dtype=config.backbone.dtype), indent=1)
    return "".join(f"# {line}\n" for line in ["DeepSpeed gets:", *merged.splitlines()])
