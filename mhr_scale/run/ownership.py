"""One owner per folder: a lock that dies with its process and says who holds it.

The lock is a record lock on a small file, which the system drops when the process ends, however it
ends. The file's text is the owner: host, process, start, command, and a count that goes up with
every heartbeat. On file systems shared by machines, where locks may not reach the others, an owner
whose count still goes up is alive, and one whose count stands still is not; clocks are never
compared.

A process that closes any descriptor of a file loses its record locks on it: nothing else here may
open a lock file.
"""

import errno
import fcntl
import json
import os
import platform
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mhr_scale.errors import ExitCode, RunError
from mhr_scale.recipe import typed
from mhr_scale.run.runlog import log, rank

LOCK = ".lock"
BEAT_SECONDS = 10.0
#: An owner on another machine whose count stands still for so long has ended. Network file systems
#: may show a file's old text for up to a minute.
SILENCE_SECONDS = 75.0
#: Errors of locking: somebody else has the lock; the file system has no locks.
HELD = (errno.EACCES, errno.EAGAIN)
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

#: Lock files that this process holds: a record lock does not keep a process from itself.
_held: set[Path] = set()


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The process that owns a folder, as its lock file names it."""

    token: str
    host: str
    boot: str
    pid: int
    process_start: float
    started: str
    command: str
    beat: int = 0

    def __str__(self) -> str:
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid} on {self.host}, since {self.started}{command}"


@contextmanager
def owned(lock: Path, *, way_out: str) -> Iterator[None]:
    """Own the folder of a lock file inside the block; rank 0 does, the other ranks only run it.

    The file's folder is made if it is missing, and removed if it is empty in the end. Raises
    `RunError` naming the owner if another process has it.
    """
    if rank():
        yield
        return
    place = Path(os.path.realpath(lock))
    if place in _held:
        raise RunError(f"{lock.parent}: this process writes there already; {way_out}")
    made = _make_folders(lock.parent)
    try:
        held = _Held(lock, *_take(lock, way_out))
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)
            held.release()
    finally:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the new ones, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be made ({error.strerror}); name another folder"
        ) from error
    return missing[::-1]


def _take(lock: Path, way_out: str) -> tuple[int, Owner]:
    """Take the lock and write this process into its file; returns the open file and its text."""
    owner = _this_process()
    while True:
        descriptor = _open(lock)
        try:
            is_locking = _lock(descriptor, lock, way_out)
            if _is_current(descriptor, lock):  # or its last owner has removed it meanwhile
                _displace(descriptor, lock, way_out, is_locking=is_locking)
                _sign(descriptor, owner, lock)
                return descriptor, owner
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(lock: Path) -> int:
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(lock, error) from error


def _unwritable(lock: Path, error: OSError) -> RunError:
    return RunError(f"{lock}: cannot be written ({error.strerror}); name another folder")


def _lock(descriptor: int, lock: Path, way_out: str) -> bool:
    """Lock an open file; returns whether its file system has locks at all."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise _refusal(lock, _read(descriptor), way_out) from error
        if error.errno not in WITHOUT_LOCKS:
            raise
        return False
    return True


def _displace(descriptor: int, lock: Path, way_out: str, *, is_locking: bool) -> None:
    """Raise `RunError` if the process that the file names is alive; else log that it is not."""
    before = _read(descriptor)
    if before is None:
        return
    if before.boot != boot_id():
        log.warning(
            "%s: was last used by %s; watching for %g s whether that still lives",
            lock.parent,
            before,
            SILENCE_SECONDS,
        )
        is_alive = _is_beating(descriptor, before)
    else:
        is_alive = not is_locking and _is_running(before)
    if is_alive:
        raise _refusal(lock, before, way_out)
    log.warning("%s: taken over from %s, which ended without a word", lock.parent, before)


def _is_beating(descriptor: int, owner: Owner) -> bool:
    """Whether the owner in a lock file writes to it within `SILENCE_SECONDS`."""
    end = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENCE_SECONDS))
        if _read(descriptor) != owner:
            return True
    return False


def _is_running(owner: Owner) -> bool:
    """Whether a process of this machine is still the one that the file names."""
    try:
        started = _process_start(owner.pid)
    except ProcessLookupError:
        return False
    return not (started and owner.process_start) or abs(started - owner.process_start) < 1.0


def _refusal(lock: Path, owner: Owner | None, way_out: str) -> RunError:
    who = "another process" if owner is None else str(owner)
    return RunError(f"{lock.parent}: in use by {who}; wait for its end, stop it, or {way_out}")


# -- the file --------------------------------------------------------------------------------------


def _this_process() -> Owner:
    return Owner(
        token=secrets.token_hex(8),
        host=platform.node(),
        boot=boot_id(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=shlex.join(sys.argv)[:200],
    )


def _process_start(pid: int) -> float:
    """When a process started, in seconds of the epoch; 0 where only that it runs can be told.

    Adapters are exported where torch, safetensors and transformers alone are installed. Raises
    `ProcessLookupError` if there is no such process.
    """
    try:
        import psutil
    except ImportError:
        with suppress(PermissionError):  # of another user
            os.kill(pid, 0)
        return 0.0
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error as error:
        raise ProcessLookupError(pid) from error


def boot_id() -> str:
    """What tells running systems apart: this one's boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        import psutil

        return f"{platform.node()} {psutil.boot_time():.0f}"


def _is_current(descriptor: int, lock: Path) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except OSError:
        return False


def _write(descriptor: int, owner: Owner) -> None:
    data = json.dumps(asdict(owner)).encode()
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))


def _sign(descriptor: int, owner: Owner, lock: Path) -> None:
    try:
        _write(descriptor, owner)
    except OSError as error:
        lock.unlink(missing_ok=True)
        raise _unwritable(lock, error) from error


def _read(descriptor: int) -> Owner | None:
    return _parse(os.pread(descriptor, 1 << 16, 0))


def _parse(data: bytes) -> Owner | None:
    """The owner in a lock file's text; None if it names nobody."""
    try:
        return typed.build(Owner, json.loads(data), name="owner")
    except (ValueError, TypeError):
        return None


class _Held:
    """A lock this process has, and the thread that counts up its heartbeat."""

    def __init__(self, lock: Path, descriptor: int, owner: Owner) -> None:
        self._lock, self._descriptor, self._owner = lock, descriptor, owner
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="mhr_scale-owner", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beat = 0
        while not self._end.wait(BEAT_SECONDS):
            if not self._is_ours():
                self._leave()
            beat += 1
            with suppress(OSError):  # a full disk must not end a run whose lock holds
                _write(self._descriptor, replace(self._owner, beat=beat))
                os.fsync(self._descriptor)  # or other machines would see it much later

    def _is_ours(self) -> bool:
        """Whether the file is still there and still names this process."""
        found = _read(self._descriptor) if _is_current(self._descriptor, self._lock) else None
        return found is not None and found.token == self._owner.token

    def _leave(self) -> None:
        """End the process at once: what it writes now would mix with another's."""
        with suppress(OSError, ValueError):
            sys.stderr.write(
                f"error: {self._lock.parent}: this process no longer owns it: {self._lock.name} "
                "was removed, or another process has taken it over while this one stood still; "
                "left without saving; the same command goes on from the last save\n"
            )
            sys.stderr.flush()
        os._exit(ExitCode.MISTAKE)

    def release(self) -> None:
        """Give the folder back."""
        self._end.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_ours():
                self._lock.unlink()
        os.close(self._descriptor)
