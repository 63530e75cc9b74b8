"""Folders that appear complete or not at all.

A sealed folder has `DONE` inside, a JSON list of its files with sizes and sha256: without it the
folder counts as absent, and `check` finds any file that is not what was written. A new folder is
filled beside its destination and moved there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mhr_scale.errors import RunError, first_line
from mhr_scale.run.files import as_size, flush, hash_file, names_in, write_json
from mhr_scale.run.ownership import LOCK, owned

DONE = "DONE"


@contextmanager
def sealed(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` at the end of the block, in one move.

    A block that fails leaves nothing; a process that dies in it leaves a folder `.<name>.tmp`.
    """
    partial = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        facts = {
            str(file.relative_to(partial)): {
                "bytes": file.stat().st_size,
                "sha256": hash_file(file),
            }
            for file in files
        }
        for path in (*files, *(path for path in partial.rglob("*") if path.is_dir())):
            flush(path)
        write_json(partial / DONE, {"files": facts})
        flush(partial)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(folder, replaced)
        os.replace(partial, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def check(folder: Path) -> None:
    """Raise `RunError` naming the first file of a sealed folder that is not what was written.

    A folder whose `DONE` is empty was saved by an earlier version and passes.
    """
    done = folder / DONE
    try:
        text = done.read_text(encoding="utf-8")
        facts = json.loads(text)["files"] if text else {}
        for name, expected in facts.items():
            file = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise RunError(f"{done}: names {name!r}, which is no file of this folder")
            if not file.is_file():
                raise RunError(f"{file}: missing, though {DONE} lists it")
            if file.stat().st_size != expected["bytes"]:
                raise RunError(
                    f"{file}: {file.stat().st_size} bytes, {expected['bytes']} were written"
                )
            if hash_file(file) != expected["sha256"]:
                raise RunError(f"{file}: damaged, its hash is not the one in {DONE}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{done}: not a readable list of files ({error!r})") from error


def recover(parent: Path) -> None:
    """Clean up after processes that died in `sealed`. One process calls it.

    Partial folders are removed; a folder that was moved away to be replaced is restored.
    """
    names = [name for name in names_in(parent) if name.startswith(".") and name.endswith(".tmp")]
    for replaced in (parent / name for name in names if name.endswith(".old.tmp")):
        folder = parent / replaced.name.removeprefix(".").removesuffix(".old.tmp")
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(replaced, folder)
    for name in names:
        shutil.rmtree(parent / name, ignore_errors=True)


def unseal(folder: Path) -> None:
    """Remove a sealed folder, `DONE` first: a partly removed one must not count as complete."""
    (folder / DONE).unlink(missing_ok=True)
    shutil.rmtree(folder)


# -- new folders ----------------------------------------------------------------------------------


def check_target(target: Path) -> None:
    """Raise `RunError` unless the target is absent, or an empty folder that can be replaced."""
    if target.exists() and not target.is_dir():
        raise RunError(f"folder: {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise RunError(f"folder: {target} is not empty; name another folder, or empty it")
    if os.path.ismount(target):
        raise RunError(f"folder: {target} is where a disk is mounted; name a folder below it")
    above = nearest_folder(target)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RunError(f"folder: cannot write in {above}; name another folder")


def nearest_folder(target: Path) -> Path:
    """The nearest path above `target` that exists."""
    return next(path for path in target.absolute().parents if path.exists())


def check_room(folder: Path, n_bytes: int, *, what: str) -> None:
    """Raise `RunError` if the disk below `folder`, which exists, has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise RunError(
            f"folder: {what} takes {as_size(n_bytes)} and {folder} has {as_size(free)} left; name "
            "a folder on another disk"
        )


@contextmanager
def moved_into_place(target: Path) -> Iterator[Path]:
    """A folder on the target's disk that becomes the target; removed if the block fails.

    Raises `RunError` if the target is taken, also by a process that is still at work on it.
    """
    place = Path(os.path.realpath(target))
    unfinished = _beside(place)
    with owned(unfinished.with_suffix(LOCK), way_out="name another folder"):
        check_target(target)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            yield unfinished
            for path in (*unfinished.rglob("*"), unfinished):
                flush(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished, place)
            flush(place.parent)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"folder: cannot write to {target} ({first_line(error)}); make room, or name a "
                "folder on another disk"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _beside(place: Path) -> Path:
    """Where a new folder is filled: its own place, though other folders have the same name."""
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    return nearest_folder(place) / f".{place.name[:100]}.{digest}.unfinished"
