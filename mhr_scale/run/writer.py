"""One background thread that writes saves, so that no step waits for a disk.

At most one write is in flight: the next one waits for it. What a write raises comes out of the next
call here. Whoever submits hands over values that nobody changes any more.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Runs one write at a time beside the caller."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mhr_scale-save")
        self._running: Future[object] | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Start a write after the one before is done; raises what that one raised."""
        self.wait()
        self._running = self._threads.submit(write)

    def check(self) -> None:
        """Raise what a write that is over raised; does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written; raises what the write raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the write in flight, also when the block fails: its save is a good one."""
        try:
            self.wait()
        except BaseException as failed:
            if error is None:
                raise
            error.add_note(f"and the save in flight failed: {failed}")
