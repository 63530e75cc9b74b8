"""A folder that the ranks of a launch share on a machine, to write and map files once for all.

    <temporary folder>/mhr_scale-<user>-<host>/<launch>.lock   held by the ranks inside
                                               <launch>/       their files
                                               <launch>/1234.left   a process that has mapped them

The last rank to leave removes the files' names; the system frees what is mapped when the last
process ends, however it ends. What launches leave that were killed before then, the next one
removes: nobody holds its lock, and none of its processes is alive.
"""

import errno
import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mhr_scale.run.runlog import ranks_here


@contextmanager
def machine_folder(purpose: str) -> Iterator[Path]:
    """The folder of this launch for a purpose; its files are gone once all ranks have left.

    Raises `OSError` where the temporary folder cannot be written.
    """
    home = _home()
    _sweep(home)
    facts = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    launch = hashlib.sha256("/".join([*facts, purpose]).encode()).hexdigest()[:24]
    folder, lock = home / launch, home / f"{launch}.lock"
    descriptor, is_mapped = _hold(lock), False
    try:
        folder.mkdir(exist_ok=True)
        yield folder
        (folder / f"{os.getpid()}.left").touch()
        is_mapped = True
    finally:
        try:
            if _is_alone(descriptor) and not (is_mapped and _n_left(folder) < ranks_here()):
                _remove(folder, lock)
        finally:
            os.close(descriptor)


def _home() -> Path:
    """This user's own folder for all launches on this machine."""
    home = Path(tempfile.gettempdir()) / f"mhr_scale-{os.getuid()}-{platform.node()}"
    home.mkdir(mode=0o700, exist_ok=True)
    facts = home.lstat()
    if not home.is_dir() or home.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 63:
        raise PermissionError(errno.EACCES, "not this user's alone", str(home))
    return home


def _sweep(home: Path) -> None:
    """Remove what dead launches have left."""
    for lock in home.glob("*.lock"):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # another launch sweeps too
            continue
        try:
            if _is_alone(descriptor) and not _n_left(lock.with_suffix("")):
                _remove(lock.with_suffix(""), lock)
        finally:
            os.close(descriptor)


def _hold(lock: Path) -> int:
    """Share a lock file with the other ranks; returns it, open."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except FileNotFoundError:  # swept before it was held
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_alone(descriptor: int) -> bool:
    """Whether nobody else holds an open lock file; then this process has it alone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _n_left(folder: Path) -> int:
    """How many living processes have mapped the files and left."""
    return sum(psutil.pid_exists(int(file.stem)) for file in folder.glob("*.left"))


def _remove(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)
