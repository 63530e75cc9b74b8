"""Failures outside the program (disks, memory, other ranks), each in one line with a way out.

Libraries raise these as errors of many types; `explain` recognises them by number or by text.
"""

import errno
import re
import resource
from collections.abc import Collection
from dataclasses import dataclass

from mhr_scale.errors import EngineError, ExitCode, UserError, first_line, one_line

#: Errors of the file system, and what to do.
FILES = {
    errno.ENOSPC: ("the disk is full", "make room, or name a folder on another disk"),
    errno.EDQUOT: ("the quota of the disk is used up", "make room, or name a folder elsewhere"),
    errno.EFBIG: ("the file may not grow so large", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the disk is read-only", "name a folder on another disk"),
    errno.EACCES: ("no permission", "change the permissions, or name another folder"),
    errno.EPERM: ("not permitted", "change the permissions, or name another folder"),
    errno.ENOENT: ("is not there, or not any more", "put it back"),
    errno.ENOTDIR: ("is not there, or not any more", "put it back"),
    errno.ENAMETOOLONG: ("the name is too long", "name another folder or file"),
    errno.ELOOP: ("the link leads round in a circle", "remove the link"),
    errno.EISDIR: ("a folder lies where a file belongs", "move it away"),
    errno.EIO: ("the disk failed", "look after the disk, or name a folder on another one"),
    errno.ESTALE: ("its server has lost it", "mount it again"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many open files on this machine", "close some programs"),
}
#: What makes a run take less memory: what to do, and with which settings.
LESS_MEMORY = {
    "lower": (
        "batch.micro_batch_size",
        "batch.max_input_tokens",
        "waves.size",
        "scoring.max_tokens",
    ),
    "set": ("backbone.recompute",),
    "shard or offload the backbone by": ("run.ds_config",),
}
#: Address space that importing the libraries takes. With less some of them do not fail but wait
#: for memory for good.
LEAST_ADDRESS_SPACE = 1.5e9
#: Limits of a process's memory: what `ulimit` calls them, and the system's number.
MEMORY_LIMITS = {"ulimit -v": resource.RLIMIT_AS, "ulimit -d": resource.RLIMIT_DATA}
_REFUSED = re.compile(
    r"can't start new thread|failed to map segment|cannot allocate memory in static TLS|"
    r"resource temporarily unavailable",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc|not enough memory",
    re.IGNORECASE,
)
_ANY_ORDER = re.compile(
    r"(\S+) does not have a deterministic implementation|Deterministic behavior was enabled",
)
_TIMEOUT = re.compile(r"timed out waiting|collective operation timeout|wait timeout", re.IGNORECASE)
_LOST = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|remote process exited|"
    r"application timeout caused pair closure",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Explained:
    """One line for the person at the keyboard, and the exit code."""

    text: str
    code: int = ExitCode.MISTAKE


STUCK_RANK = Explained(
    "waited in vain for the other ranks, as long as run.timeout_seconds says: one of them is "
    "stuck, or slower than that; look at its last lines, or raise run.timeout_seconds"
)
LOST_RANK = Explained(
    "ends because another rank has ended, whose own lines say why", ExitCode.ANOTHER_RANK
)


def explain(error: BaseException, settings: Collection[str] = ()) -> Explained | None:
    """The explanation of an error whose cause is outside the program; None for any other.

    `settings` are those of the verb that failed: only they are advised.
    """
    if isinstance(error, UserError):
        return Explained(str(error))
    if not isinstance(error, Exception):
        return None
    text = f"{type(error).__name__}: {error}"
    used_up = Explained(
        f"memory is used up ({first_line(error)}){_memory_limits()}; {_less_memory(settings)}"
    )
    if isinstance(error, RuntimeError | ImportError | OSError) and _REFUSED.search(text):
        return Explained(
            f"no room for a thread or a library ({first_line(error)}): memory or threads are "
            f"limited too narrowly{_memory_limits() or ', perhaps by a container or a scheduler'}; "
            "raise that limit (or ulimit -u), or lower OMP_NUM_THREADS"
            f"{' and batch.workers' if 'batch.workers' in settings else ''}"
        )
    if isinstance(error, MemoryError) or _names(error) & {"OutOfMemoryError"}:
        return used_up
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return used_up
    number = file_error(error)
    if number is not None and not _LOST.search(text):
        return Explained(describe_file_error(error, number))
    if not isinstance(error, RuntimeError):
        return None
    in_any_order = _ANY_ORDER.search(text)
    if in_any_order:
        return Explained(
            "run.deterministic: torch has no deterministic form of "
            f"{in_any_order[1] or 'a product'} on this device ({first_line(error)}); leave "
            "run.deterministic out"
        )
    if _TIMEOUT.search(text):
        return STUCK_RANK
    if _LOST.search(text) or _names(error) & {"DistNetworkError"}:
        return LOST_RANK
    if _MEMORY.search(text):
        return used_up
    if "DataLoader worker" in text:
        return Explained(
            f"a process that prepares batches was ended ({first_line(error)}); is memory, or "
            "/dev/shm, used up? lower batch.workers"
        )
    return None


def _less_memory(settings: Collection[str]) -> str:
    """How to get by with less memory, or with more of it, in words."""
    ways = []
    for what, names in LESS_MEMORY.items():
        known = [name for name in names if name in settings]
        if known:
            ways.append(f"{what} {' or '.join(known)}")
    return ", or ".join([*ways, "close other programs, or take a machine with more"])


def check_address_space() -> None:
    """Raise `EngineError` if this process may not have the address space that imports take."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY and most < LEAST_ADDRESS_SPACE:
        raise EngineError(
            f"memory is limited too narrowly{_memory_limits()}: the libraries alone take "
            f"{LEAST_ADDRESS_SPACE / 1e9:.1f} GB of address space; raise that limit"
        )


def _memory_limits() -> str:
    """The limits on this process's memory, where there are any, as part of a sentence."""
    most = {name: resource.getrlimit(number)[0] for name, number in MEMORY_LIMITS.items()}
    listed = ", ".join(
        f"{limit / 1e9:.2f} GB ({name})"
        for name, limit in most.items()
        if limit != resource.RLIM_INFINITY
    )
    return f" under a limit of {listed}" if listed else ""


def file_error(error: BaseException) -> int | None:
    """The errno of a file-system error, also inside an error of safetensors; else None."""
    if isinstance(error, OSError) and error.errno in FILES:
        return error.errno
    number = number_in(error)
    return number if number in FILES else None


def number_in(error: BaseException) -> int | None:
    """The errno that safetensors writes into the text of its errors."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def describe(error: Exception) -> str:
    """What happened to a file, and the way out if there is a known one."""
    number = file_error(error)
    return repr(error) if number is None else describe_file_error(error, number)


def describe_file_error(error: Exception, number: int) -> str:
    """Which file, what happened, and the way out."""
    what, way_out = FILES[number]
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    place = f"{name}: {what}" if name else f"{what} ({first_line(error)})"
    return one_line(f"{place}; {way_out}")


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
