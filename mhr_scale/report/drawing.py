"""Style and inline SVG of all pictures; equal pictures have equal bytes.

Text stays text. Colours of the style sheet are written as its variables, so that pictures follow
the page's dark mode and print light.
"""

import io
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mhr_scale.errors import one_line

T = TypeVar("T")

INK, MUTED, LINE, PAPER = "#1a1a1b", "#6a6a6b", "#d8d8d9", "#fdfdfe"
#: Okabe and Ito's colours, which most colour-blind readers tell apart, without yellow and black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f80")
#: Series in a picture that colours alone tell apart.
MOST_SERIES = len(COLOURS)
#: Together with the colours they tell 28 curves apart.
DASHES = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1.4, 1, 1.4)))
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"} | {
    colour: f"--c{number}" for number, colour in enumerate(COLOURS)
}
#: Width of a picture in inches of 72 units: nearly its size on a phone.
WIDTH = 5.2
#: Longest name in a picture; the table below it has names in full.
LONGEST_NAME = 26

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mhr_scale",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the report's style, without warnings about glyphs that the measuring font lacks."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def colour(number: int) -> str:
    """The colour of a series."""
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> object:
    """The dashes of a series, which differ among series of one colour."""
    return DASHES[number // len(COLOURS) % len(DASHES)]


def short(name: str, *, longest: int = LONGEST_NAME) -> str:
    """A name for a picture: printable, and with the middle left out if it is long."""
    text = one_line(name)
    if len(text) <= longest:
        return text
    tail = longest // 3
    return f"{text[: longest - tail - 1]}\u2026{text[-tail:]}"


def count(value: float, _: object = None) -> str:
    """A number of parameters or steps in short form, such as 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def legend_columns(names: Collection[str]) -> int:
    """Columns of a legend, so that its longest name fits."""
    return max(1, min(4, len(names), 60 // (max(map(len, names), default=0) + 6)))


def by_rows(entries: Sequence[T], columns: int) -> list[T]:
    """Entries of a legend so that they read row by row: matplotlib fills columns."""
    return [entry for column in range(columns) for entry in entries[column::columns]]


def legend_below(figure: Figure, axes: Axes) -> None:
    """A legend of all series below the picture."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = legend_columns(labels)
        handles, labels = by_rows(handles, columns), by_rows(labels, columns)
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def to_svg(figure: Figure, *, title: str) -> str:
    """The picture as a self-contained `svg` element."""
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=no_metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    width = float(box[0].split()[2])
    for hex_colour, variable in VARIABLES.items():
        body = body.replace(hex_colour, f"var({variable})")
    body = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"; ?font-family: [^;\"]*|font-family: [^;\"]*;? ?", "", body)
    body = body.replace("stroke: #000000", "stroke: currentColor")
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"\n\s*", "\n", body)
    link = 'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg"'
    opening = f'<svg {link} {box[0]} role="img" style="--natural: {width:.0f}px">'
    return f"{opening}\n<title>{escape(title)}</title>{body}".rstrip()


def with_prefix(svg: str, prefix: str) -> str:
    """The picture with prefixed ids, which are unique on a page with several pictures."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
