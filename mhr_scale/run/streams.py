"""Standard output carries results; standard error carries log lines and progress.

The readers of both may end before the program does: a closed stream, `| head`, a lost terminal.
What has no reader is dropped. A log line is not missed; a result is, and `lost_result` says so.
"""

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

from tqdm import tqdm

from mhr_scale.errors import printable

#: What happens to a stream whose reader is gone, or that was closed from the start.
UNREAD = (errno.EPIPE, errno.EBADF)


class _Results:
    """Where results go, and the first error of writing one."""

    def __init__(self) -> None:
        self.stream: TextIO | None = None
        self.is_redirected = False
        self.error: OSError | None = None


_results = _Results()


@contextmanager
def opened() -> Iterator[None]:
    """Keep standard output for results: what libraries print inside the block goes to the other.

    Characters that an encoding lacks are escaped, and closed streams opened on nothing: files
    opened later would take their numbers, and get what was meant for them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _results.stream, _results.is_redirected, _results.error = sys.stdout, True, None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.is_redirected = False


def write_result(text: str) -> None:
    """Write text to standard output, control characters escaped; rank 0 calls it.

    An error is kept for `lost_result`, so that a verb comes to its end.
    """
    stream = _results.stream if _results.is_redirected else sys.stdout
    try:
        if stream is None:
            raise OSError(errno.EBADF, "closed from the start")
        with tqdm.external_write_mode(file=sys.stderr):
            stream.write(printable(text, keep="\n\t"))
            stream.flush()
    except OSError as error:
        _results.error = _results.error or OSError(error.errno, error.strerror, "standard output")
        if stream is not None:
            _drop(stream)


def lost_result() -> OSError | None:
    """The error of the first result that could not be written."""
    return _results.error


def is_unread(error: OSError) -> bool:
    """Whether a stream has no reader, or none any more."""
    return error.errno in UNREAD


def _drop(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere, or the interpreter would complain at its end."""
    with suppress(OSError, ValueError):  # a stream in memory has no number
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class LogHandler(logging.StreamHandler[TextIO]):
    """Log lines above progress bars, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with what a terminal would take for a command escaped."""
        return printable(super().format(record), keep="\n\t")

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line; logging drops it if there is nobody to read it."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
