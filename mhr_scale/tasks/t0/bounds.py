"""Bounds on what a template may take: a stranger's code that could run or grow for ever.

The sandbox keeps a template from the machine, and not from loops in loops or from texts of
gigabytes. So it is compiled and rendered under a timer of the processor time that is used, and
under a limit of the memory of the process; both end in an error that names the template.
"""

import os
import resource
import signal
import threading
from typing import NoReturn

from mhr_scale.errors import DataError

#: Processor time of one render, in seconds; the templates of T0 take less than a thousandth.
MOST_SECONDS = 10.0
#: Memory that one render may take, in bytes.
MOST_BYTES = 2**30
#: Length of a rendered text, in characters.
MOST_CHARACTERS = 10_000_000

PAGE = resource.getpagesize()


class UnboundedTemplateError(DataError):
    """A template took too much: every row of it would, so that none is worth trying."""


class bounded:
    """Raise `UnboundedTemplateError` inside the block once it has taken too long or too much.

    Processor time is measured, not the clock's: a busy machine stops no template.
    """

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other one gets signals
            if signal.getsignal(signal.SIGVTALRM) is not _stop:
                signal.signal(signal.SIGVTALRM, _stop)
            # again and again, in case that the first one is raised where nobody sees it
            signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS, 1.0)
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        limits = [limit for limit in self._before if limit != resource.RLIM_INFINITY]
        most = min([_used_bytes() + MOST_BYTES, *limits])
        resource.setrlimit(resource.RLIMIT_AS, (most, self._before[1]))

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, self._before)
        if isinstance(error, MemoryError):
            raise UnboundedTemplateError(
                f"it takes more than {MOST_BYTES / 2**30:g} GiB of memory"
            ) from error


def check_length(text: str) -> str:
    """The text itself; raises `UnboundedTemplateError` if it is absurdly long."""
    if len(text) > MOST_CHARACTERS:
        raise UnboundedTemplateError(
            f"it makes {len(text)} characters of one row, more than {MOST_CHARACTERS}"
        )
    return text


def _stop(number: int, frame: object) -> NoReturn:
    raise UnboundedTemplateError(f"it takes more than {MOST_SECONDS:g} seconds")


def _used_bytes() -> int:
    """The address space that the process takes, as `RLIMIT_AS` counts it."""
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 64).split()[0]) * PAGE
    finally:
        os.close(file)
