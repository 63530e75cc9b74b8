"""DeepSpeed's asynchronous I/O is compiled where it is used first, by one process of a machine.

torch guards a folder in which it compiles by a file called `lock`, which has no text and outlives
a process that is killed. Every later process would wait for its removal, for good and in silence.
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from mhr_scale.errors import EngineError, first_line
from mhr_scale.run.files import named
from mhr_scale.run.runlog import as_time, log

#: What is compiled for it, in this order.
NAMES = ("pin_memory", "async_io")
COMPILING = (
    "compiling DeepSpeed's asynchronous I/O into %s (once; takes minutes, a processor for each of "
    "its files)"
)
#: What is compiled is loaded in less.
LOADED_SECONDS = 5.0
#: Files of a folder in which a process compiles are written in shorter intervals than this.
QUIET_SECONDS = 300.0
#: The file of which a process that compiles has a lock; it dies with the process.
TURN = "mhr_scale.lock"


def load_operation(op: Any) -> None:
    """Load the operation of DeepSpeed's builder `op`, compiled before where that is missing.

    Raises `EngineError` if it cannot be compiled, or if another program may be at it.
    """
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get(NAMES[-1]):
        op.load(verbose=False)
        return
    folders = [build_folder(name) for name in NAMES]
    place = folders[-1]
    with _turn(place.parent):
        for folder in folders:
            clear_lock(folder / "lock")
        is_new = not (place / f"{place.name}.so").exists()
        # torch compiles anew, and says nothing, where it was compiled for another environment
        soon = threading.Timer(0.0 if is_new else LOADED_SECONDS, log.info, (COMPILING, place))
        soon.start()
        begun = time.monotonic()
        try:
            op.load(verbose=False)
        except (RuntimeError, ImportError) as error:
            raise EngineError(
                f"{place}: DeepSpeed's asynchronous I/O cannot be compiled ({first_line(error)}); "
                "install libaio-dev, g++ and ninja, or use ds_configs/zero3_offload.json"
            ) from error
        finally:
            soon.cancel()
        seconds = time.monotonic() - begun
        if is_new or seconds > LOADED_SECONDS:
            log.info("compiled in %s", as_time(seconds))


def build_folder(name: str) -> Path:
    """The folder in which torch compiles an extension (variable TORCH_EXTENSIONS_DIR); made."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(name, verbose=False))


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Be the only process of ours that compiles in a folder, however long others take."""
    file = folder / TURN
    with named(file), file.open("a") as held:
        is_told = False
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not is_told:
                    log.info("waiting for another process that compiles in %s", folder)
                is_told = True
                time.sleep(0.5)
            except OSError:  # a file system without locks
                break
            else:
                break
        yield


def clear_lock(lock: Path) -> None:
    """Remove torch's lock file if the process that made it has ended, and its compilers too.

    That process has it open as long as it compiles. Raises `EngineError` if nobody on this machine
    has, but files beside it are so new that another machine may be at work there.
    """
    if not lock.exists():
        return
    owners = [process for process in psutil.process_iter() if _has_open(process, lock)]
    if owners:
        log.info("%s: waiting for process %d, which compiles there", lock, owners[0].pid)
        return
    orphans = [process for process in psutil.process_iter() if _works_in(process, lock.parent)]
    if orphans:
        log.info("%s: waiting for what a killed process left at work (%d)", lock, orphans[0].pid)
        psutil.wait_procs(orphans)
    newest = max((file.stat().st_mtime for file in lock.parent.iterdir()), default=0.0)
    quiet = time.time() - newest
    if quiet < QUIET_SECONDS and not orphans:
        raise EngineError(
            f"{lock}: left by a process that ended, or by one that compiles there on another "
            f"machine; remove it, or start again in {QUIET_SECONDS - quiet:.0f} s"
        )
    log.warning("%s: removed, it was left by a process that was killed while it compiled", lock)
    lock.unlink(missing_ok=True)


def _has_open(process: psutil.Process, file: Path) -> bool:
    """Whether a process has a file open, as far as this user may see it."""
    with suppress(psutil.Error, OSError):
        return os.path.realpath(file) in {opened.path for opened in process.open_files()}
    return False


def _works_in(process: psutil.Process, folder: Path) -> bool:
    """Whether a process has a folder as its working directory, as compilers have."""
    with suppress(psutil.Error, OSError):
        return bool(process.cwd() == os.path.realpath(folder))
    return False
