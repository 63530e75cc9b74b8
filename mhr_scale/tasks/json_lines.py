"""JSON lines: one object a line, UTF-8, blank lines and a byte order mark allowed.

What is no object in strict JSON is refused, and costs only its line.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mhr_scale.errors import DataError
from mhr_scale.tasks.task import Intake, Place


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLine:
    """One line that holds a JSON object: where it stood, its text and the object."""

    place: Place
    text: str
    row: dict[str, Any]


def iter_rows(path: Path, *, task: str, intake: Intake) -> Iterator[JsonLine]:
    """Yield the lines of `path` that hold a JSON object; refuse the others under the name `task`.

    Reads bytes line by line, so that a bad line costs only itself. The fields are the caller's.
    """
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                raw = raw.rstrip(b"\r\n")
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if not raw.strip():
                    continue
                place = Place(file=str(path), line=number)
                text = raw.decode("utf-8", errors="replace")
                try:
                    row = parse_object(raw)
                except ValueError as error:
                    intake.refuse(place=place, task=task, reason=str(error), text=text)
                else:
                    yield JsonLine(place=place, text=text, row=row)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly; the `ValueError` it raises says what is wrong.

    Refused beside malformed JSON: bytes that are not UTF-8, NaN and Infinity, a key that appears
    twice, an unpaired surrogate (`"\\ud800"`, which no tokenizer takes) and absurd nesting.
    """
    try:
        row = parse(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"bad UTF-8 at byte {error.start + 1}: {error.reason}") from None
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {kind_of(row)}")
    return row


def parse(text: str) -> Any:
    """Parse any JSON value as strictly; the `ValueError` it raises says what is wrong."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=no_twins)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("unpaired surrogate in a string") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("malformed JSON: nested too deeply") from None
    return value


def kind_of(value: object) -> str:
    """Name the JSON type of a parsed value with its article, or another type of a table."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys, for json's `object_pairs_hook`; `ValueError` if one is repeated."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twin!a} appears twice")
    return made
