"""Tables as text, Markdown, CSV or LaTeX: as a launch was asked to print them."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from mhr_scale.errors import ConfigError, did_you_mean
from mhr_scale.run.runlog import log

FORMATS = ("text", "markdown", "csv", "latex")
#: Cells of columns that stand to the right.
_NUMBER = re.compile(r"[-+<]?[\d.,]+(e[-+]?\d+)?[%KMB]?|-|")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_format: ContextVar[str] = ContextVar("format", default="text")


@contextmanager
def printed_as(name: str) -> Iterator[None]:
    """Print tables in this format inside the block; raises `ConfigError` for an unknown one."""
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"--format {name}: one of {known}{did_you_mean(name, FORMATS)}")
    token = _format.set(name)
    try:
        yield
    finally:
        _format.reset(token)


def render(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in the format asked for; columns of numbers stand to the right."""
    columns = list(zip(heads, *rows, strict=True))
    is_right = [all(_NUMBER.fullmatch(cell) for cell in cells[1:]) for cells in columns]
    as_format = {"text": _text, "markdown": _markdown, "csv": _csv, "latex": _latex}
    return as_format[_format.get()]([heads, *rows], is_right)


def prose(text: str) -> str:
    """Lines beside tables, in the format asked for: in a CSV they have no place but the log."""
    name = _format.get()
    if name == "csv":
        if text.strip():
            log.info("%s", text.strip("\n"))
        return ""
    if name == "latex":
        return "".join(f"% {line}\n" if line else "\n" for line in text.splitlines())
    return text


def _text(lines: Sequence[Sequence[str]], is_right: Sequence[bool]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_right, strict=True)
        ).rstrip()
        + "\n"
        for line in lines
    )


def _markdown(lines: Sequence[Sequence[str]], is_right: Sequence[bool]) -> str:
    head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---:" if right else "---" for right in is_right]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows)) + "\n"


def _csv(lines: Sequence[Sequence[str]], is_right: Sequence[bool]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _latex(lines: Sequence[Sequence[str]], is_right: Sequence[bool]) -> str:
    head, *rows = [
        " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in line) + r" \\"
        for line in lines
    ]
    places = "".join("r" if right else "l" for right in is_right)
    parts = [rf"\begin{{tabular}}{{{places}}}", r"\hline", head, r"\hline", *rows, r"\hline"]
    return "\n".join([*parts, r"\end{tabular}"]) + "\n"
