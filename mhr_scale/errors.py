"""Errors meant for the user, and hints for misspelt names.

Every `UserError` ends a launched verb with exit code 2 and one line: what is wrong, where, and the
way out. Any other exception is a bug of ours and keeps its traceback.
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
    "printable",
    "shortened",
    "some",
    "suggest",
]


#: Longest error text, in characters; the middle is cut, as the way out comes at the end.
LONGEST_TEXT = 900
#: Longest quotation of a user's text in an error, in characters.
LONGEST_QUOTE = 40


class ExitCode(IntEnum):
    """Exit codes of a launched verb; launch/README.md has the table."""

    DONE = 0
    DEFECT = 1
    """A bug of ours, with a traceback."""
    MISTAKE = 2
    """A `UserError`, or a disk, memory or stuck rank that the user can mend: one line."""
    ANOTHER_RANK = 69
    """This rank is fine and another one is not; that one's code is the one to look at."""
    AGAIN = 75
    """Stopped by a signal; the same command resumes (EX_TEMPFAIL of sysexits.h)."""
    UNREAD = 141
    """Done, but standard output had no reader for the result (what a shell makes of SIGPIPE)."""


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
    """Return `; did you mean 'x'?` for a known word with this prefix, or the closest; else ''."""
    known = list(known)
    completions = [name for name in known if len(word) > 1 and name.startswith(word)]
    matches = completions or get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def printable(text: str, *, keep: str = "") -> str:
    """Text with unprintable characters escaped, except those to keep, lest a terminal obeys it."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for a name near a known one, else the first of those known."""
    names = list(known)
    return did_you_mean(word, names) or f"; there are: {some(names) or 'none'}"


def one_line(text: str) -> str:
    """Text with unprintable characters escaped, and the middle of very long text left out."""
    line = printable(text)
    if len(line) <= LONGEST_TEXT:
        return line
    kept = LONGEST_TEXT * 2 // 3
    return f"{line[:kept]} ... {line[kept - LONGEST_TEXT + 5 :]}"


def some(names: Iterable[str], *, shown: int = 10) -> str:
    """The first names, and the number of further ones."""
    listed = list(names)
    rest = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the singular where it is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(text: str) -> str:
    """The text in quotes, cut if it is long."""
    return repr(text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "...")


def describe_fault(fault: Mapping[str, Any], place: Iterable[object]) -> str:
    """A pydantic error as text: the dotted name of its place, the message, and the value there.

    For a missing value there is no value to show.
    """
    name = ".".join(str(step) for step in place)
    message = fault["msg"][0].lower() + fault["msg"][1:]
    if fault["type"].startswith("missing"):
        return f"{name}: {message}"
    return f"{name}: {message}, got {json.dumps(fault['input'], default=str)}"


def first_line(error: Exception) -> str:
    """The message of another library's error, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    n_lines = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:n_lines])[:200] or type(error).__name__
