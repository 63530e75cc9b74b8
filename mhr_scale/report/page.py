"""The parts of a report (prose, tables, pictures in sections), and its HTML."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, ClassVar, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mhr_scale.report.drawing import with_prefix

#: Control characters but for tab and end of line, and what turns the direction of text.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Cell: TypeAlias = str | int | float | bool | None
#: Cells of the largest table in HTML; larger ones become tab-separated text.
LARGEST_TABLE = 6000
#: Rows of the longest table of runs that is shown open; longer ones are folded.
LONGEST = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows under columns; `decimals` is for all numbers that are not integers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    decimals: int | None = None
    note: str = ""
    is_folded: bool = False
    kind: ClassVar[str] = "table"

    @property
    def is_large(self) -> bool:
        """Whether the rows are shown as text, which a browser opens faster."""
        return len(self.rows) * len(self.columns) > LARGEST_TABLE

    @property
    def text(self) -> str:
        """The table as tab-separated lines."""
        lines = [self.columns, *([show(cell, self.decimals) for cell in row] for row in self.rows)]
        return "\n".join("\t".join(" ".join(str(cell).split()) for cell in line) for line in lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A drawing with its caption and its numbers."""

    caption: str
    svg: str
    data: Table
    kind: ClassVar[str] = "picture"

    def inline(self, number: int) -> Markup:
        """The SVG of picture `number` of a page; its names are escaped already."""
        return Markup(with_prefix(self.svg, f"p{number}"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Prose:
    """A paragraph."""

    text: str
    is_warning: bool = False
    kind: ClassVar[str] = "prose"


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """The title of a part of a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The text of a file, folded."""

    title: str
    text: str
    kind: ClassVar[str] = "listing"


Block: TypeAlias = Table | Picture | Prose | Heading | Listing


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A section of the report with an entry in the table of contents."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The whole report."""

    title: str
    lead: str
    sections: Sequence[Section]


def show(cell: Cell, decimals: int | None = None) -> str:
    """A value for readers: thousands separated, few digits, a dash for None."""
    if cell is None:
        return "\u2013"
    if isinstance(cell, str | bool):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    if not math.isfinite(cell):
        return str(cell)
    if decimals is not None:
        return f"{cell:,.{decimals}f}"
    if cell and abs(cell) < 1e-3:
        return f"{cell:.2e}"
    return f"{cell:,.0f}" if abs(cell) >= 1e4 else f"{cell:.4g}"


def is_number(cell: Any) -> bool:
    """Whether a cell is right-aligned."""
    return cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))


def render(page: Page) -> str:
    """The page as one HTML file. The same page gives the same bytes."""
    environment = Environment(
        loader=PackageLoader("mhr_scale.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["show"] = show
    environment.tests["numeric"] = is_number
    css = files("mhr_scale.report").joinpath("page.css").read_text(encoding="utf-8")
    html = environment.get_template("page.html.j2").render(page=page, css=Markup(css))
    return without_controls(html).encode("utf-8", "replace").decode("utf-8")


def without_controls(text: str) -> str:
    """Text whose control characters are spelt out; tabs and ends of lines stay."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
