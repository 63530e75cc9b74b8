"""Files: reading and writing JSON, hashes, and atomic writes that are flushed to disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mhr_scale.errors import UserError, first_line

CHUNK = 1 << 24
#: Longest JSON file that is read, in bytes; those of runs and backbones are far shorter.
MOST_JSON_BYTES = 2**29


def as_size(n_bytes: float) -> str:
    """A number of bytes as text, in the largest unit of which there is a whole one."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} bytes"


def hash_file(path: Path, *, advance: Callable[[str, int], None] | None = None) -> str:
    """sha256 of a file; `advance` is called with its name and the bytes of every chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            if advance is not None:
                advance(path.name, len(data))
    return digest.hexdigest()


def hash_parts(parts: Iterable[str | bytes]) -> str:
    """sha256 of texts and bytes, each with its length, so that they cannot run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def names_in(folder: Path) -> list[str]:
    """Names of a folder's entries, sorted; none where there is no folder.

    Raises `OSError` for a folder that may not be read, which a glob passes over.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let errors of the system inside the block name the file that is written there.

    A full disk is found by writes, and those know of no name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk before anything that follows (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_text(path: Path, text: str) -> None:
    """Append to a text file."""
    with named(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_json(
    file: Path,
    error: type[UserError],
    *,
    way_out: str = "",
    hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value in a JSON file; raises `error` with file, line and reason if it cannot be read.

    `hook` is json's `object_pairs_hook`; it may raise ValueError.
    """
    tail = f"; {way_out}" if way_out else ""
    try:
        with file.open("rb") as opened:
            raw = opened.read(MOST_JSON_BYTES + 1)
        if len(raw) <= MOST_JSON_BYTES:
            return json.loads(raw.decode("utf-8"), object_pairs_hook=hook)
    except json.JSONDecodeError as fault:
        raise error(f"{file}:{fault.lineno}: not JSON ({fault.msg}){tail}") from fault
    except UnicodeDecodeError as fault:
        raise error(f"{file}: not UTF-8 text ({fault.reason}){tail}") from fault
    except OSError as fault:
        raise error(f"{file}: cannot be read ({fault.strerror}){tail}") from fault
    except RecursionError as fault:
        raise error(f"{file}: not JSON (nested too deeply){tail}") from fault
    except ValueError as fault:  # also an integer of too many digits
        raise error(f"{file}: not JSON ({first_line(fault)}){tail}") from fault
    raise error(f"{file}: longer than {MOST_JSON_BYTES} bytes, which is no JSON file of ours{tail}")


def read_object(
    file: Path,
    error: type[UserError],
    *,
    way_out: str = "",
    hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> dict[str, Any]:
    """The JSON object in a file; raises `error` for anything else."""
    content = read_json(file, error, way_out=way_out, hook=hook)
    if not isinstance(content, dict):
        tail = f"; {way_out}" if way_out else ""
        raise error(f"{file}: not a JSON object{tail}")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: to a partial file, flushed to disk, then moved into place."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """A value as the text of a JSON file."""
    return json.dumps(value, indent=1, default=str) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with named(path):
            partial.write_text(text, encoding="utf-8")
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Flush a file to disk and move it to `path` atomically."""
    flush(partial)
    os.replace(partial, path)


def to_json_lines(rows: Iterable[Mapping[str, Any]], *, ensure_ascii: bool = True) -> str:
    """Rows as JSON lines; without `ensure_ascii` only invalid text is escaped."""
    lines = "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)
    return lines.encode("utf-8", errors="backslashreplace").decode("utf-8")
