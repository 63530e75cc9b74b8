"""Files on the disk: their hashes, and being sure that they are there."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

CHUNK = 1 << 24


def hash_file(path: Path, *, advance: Callable[[str, int], None] | None = None) -> str:
    """sha256 of a file; `advance` hears of every chunk's file and bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            if advance is not None:
                advance(path.name, len(data))
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything that follows (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
