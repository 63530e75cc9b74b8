"""Safetensors files with the mode that the umask gives, and errors that name the file."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mhr_scale.run import failures
from mhr_scale.run.files import named


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors, contiguous and on the host, into a file; the caller moves it into place."""
    with written(path):
        save_file(dict(tensors), path, metadata=metadata)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Inside the block a safetensors file is written: it gets the mode that the umask gives, the
    library's is for its owner alone; and errors of the disk name it."""
    try:
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.touch()
            mode = path.stat().st_mode
            yield
            path.chmod(mode & 0o777)
    except SafetensorError as error:
        number = failures.number_in(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
