"""Errors meant for the person at the keyboard, and the names they may have meant.

Every `UserError` ends a launched verb with exit code 2 and one line: what is wrong, where, and the
way out. Anything else that escapes is a defect of ours and keeps its traceback.
"""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from enum import IntEnum
from typing import Any

__all__ = [
    "AdapterError",
    "BackboneError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "EngineError",
    "ExitCode",
    "LayoutError",
    "RunError",
    "UserError",
    "describe_fault",
    "did_you_mean",
    "first_line",
    "one_line",
    "shortened",
    "some",
]


#: Characters of an error's text: the place stands at its beginning, the way out at its end.
LONGEST_TEXT = 900
#: Characters of a user's text that an error quotes.
LONGEST_QUOTE = 40


class ExitCode(IntEnum):
    """What a launched verb tells whoever started it; launch/README.md has the table."""

    DONE = 0
    DEFECT = 1
    """An error of ours, with a traceback."""
    MISTAKE = 2
    """A `UserError`, or a disk, memory or stuck rank that the user can mend: one line."""
    ANOTHER_RANK = 69
    """This rank is fine and another one is not; that one's code is the one to look at."""
    AGAIN = 75
    """Stopped by a signal; the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class UserError(ValueError):
    """Base of every error a user can cause and can mend.

    Its text is one printable line, whatever names and values it quotes.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(UserError):
    """A recipe, an override or a combination of settings is wrong."""


class LayoutError(UserError):
    """A layout does not fit the backbone it is asked to adapt."""


class AdapterError(UserError):
    """An adapter, its slots or its stored artefact cannot be used as asked."""


class BackboneError(UserError):
    """A backbone cannot be found, read or fitted to its configuration."""


class DataError(UserError):
    """A data file, a row or a task list is wrong."""


class EngineError(UserError):
    """The launch, the process group or the DeepSpeed file is wrong."""


class RunError(UserError):
    """A run folder cannot be used as asked."""


class DivergenceError(UserError):
    """The loss or a gradient stopped being a number."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known word that begins so or is closest, or nothing."""
    known = list(known)
    begun = [one for one in known if len(word) > 1 and one.startswith(word)]
    matches = begun or get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def one_line(text: str) -> str:
    """Text with what does not print escaped, and the middle left out of one that is very long."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(printable) <= LONGEST_TEXT:
        return printable
    kept = LONGEST_TEXT * 2 // 3
    return f"{printable[:kept]} ... {printable[kept - LONGEST_TEXT + 5 :]}"


def some(names: Iterable[str], *, shown: int = 10) -> str:
    """The first names and how many more there are."""
    listed = list(names)
    rest = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {rest} more" if rest > 0 else "")


def shortened(text: str) -> str:
    """The text in quotes, or its beginning."""
    return repr(text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "...")


def describe_fault(fault: Mapping[str, Any], place: Iterable[object]) -> str:
    """The name that a place is called by, what pydantic says is wrong there, and what stands there.

    Where something is missing, that is all there is to say.
    """
    name = ".".join(str(step) for step in place)
    message = fault["msg"][0].lower() + fault["msg"][1:]
    if fault["type"].startswith("missing"):
        return f"{name}: {message}"
    return f"{name}: {message}, got {json.dumps(fault['input'], default=str)}"


def first_line(error: Exception) -> str:
    """What an error of another library says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    n_lines = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:n_lines])[:200] or type(error).__name__
