"""One background thread that writes saves, so that no step waits for a disk.

At most one write is in flight: the next one waits for it. An error of a write is raised by the next
call here. Callers submit values that are not modified afterwards.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_in_flight: set[Future[object]] = set()


def is_writing() -> bool:
    """Whether a save of this process is being written."""
    return bool(_in_flight)


class Writer:
    """Runs one write at a time in the background."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mhr_scale-save")
        self._running: Future[object] | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Start a write once the previous one is done; raises the error of the previous one."""
        self.wait()
        self._running = self._threads.submit(write)
        _in_flight.add(self._running)
        self._running.add_done_callback(_in_flight.discard)

    def check(self) -> None:
        """Raise the error of a finished write, if any; does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written; raises the error of the write."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the write in flight, also if the block fails: that save is valid."""
        try:
            self.wait()
        except BaseException as failed:
            if error is None:
                raise
            error.add_note(f"and the save in flight failed: {failed}")
