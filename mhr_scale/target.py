"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mhr_scale.errors import RunError, first_line
from mhr_scale.files import flush


def check_target(target: Path) -> None:
    """Raise `RunError` if the target is not absent or an empty folder that can be replaced."""
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


@contextmanager
def moved_into_place(target: Path) -> Iterator[Path]:
    """A folder on the target's disk that becomes the target, or nothing if the block fails."""
    place = Path(os.path.realpath(target))
    unfinished = nearest_folder(place) / f".{place.name}.unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        for written in (*unfinished.rglob("*"), unfinished):
            flush(written)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished, place)
        flush(place.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"folder: cannot write to {target} ({first_line(error)})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
