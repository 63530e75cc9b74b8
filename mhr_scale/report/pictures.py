"""The kinds of pictures: curves, bars and dots by name, trade-offs, heat maps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mhr_scale.errors import counted
from mhr_scale.report.drawing import (
    INK,
    LINE,
    MUTED,
    PAPER,
    WIDTH,
    by_rows,
    colour,
    count,
    dash,
    legend_below,
    legend_columns,
    short,
    style,
    to_svg,
)
from mhr_scale.report.page import LONGEST, Picture, Table

#: Rows of a picture up to which they get names; the table below always has them.
MOST_NAMES = 60
#: Rows of a square heat map up to which they get names.
MOST_CELL_NAMES = 34
#: Spots up to which they are labelled with names; more get numbers and a key.
MOST_SPOT_NAMES = 12
#: Bars in one picture at most; beyond, dots.
MOST_BARS = 60
#: A picture's height in inches, at most.
TALLEST = 11.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a picture: points, an optional band or error bars, and the number of its look."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    look: int = 0
    is_marked: bool = False
    errors: Sequence[float] = ()


def curves(lines: Sequence[Curve], *, title: str, x: str, y: str, height: float = 2.9) -> str:
    """Lines over steps; on a log scale if they span more than a factor of thirty."""
    with style():
        figure = Figure(figsize=(WIDTH, height + legend_height(lines)), layout="constrained")
        axes = figure.subplots()
        draw_curves(axes, lines, x=x, y=y)
        legend_below(figure, axes)
        return to_svg(figure, title=title)


def panels(lines_by_label: Mapping[str, Sequence[Curve]], *, title: str, x: str) -> str:
    """Small pictures side by side, one for each quantity, with one legend."""
    with style():
        n_rows = math.ceil(len(lines_by_label) / 2)
        names = max(lines_by_label.values(), key=len)
        figure = Figure(figsize=(WIDTH, 1.9 * n_rows + legend_height(names)), layout="constrained")
        labels = list(lines_by_label)
        rows = [labels[start : start + 2] for start in range(0, len(labels), 2)]
        if len(rows) > 1:  # a last one alone is as wide as two
            rows[-1] = [rows[-1][0], rows[-1][-1]]
        grid: dict[str, Axes] = figure.subplot_mosaic(rows)
        for y, lines in lines_by_label.items():
            axes = grid[y]
            draw_curves(axes, lines, x=x, y="")
            axes.set_title(y)
            if axes.get_yscale() == "linear" and min(min(line.y) for line in lines) >= 0:
                axes.set_ylim(bottom=0)
                if axes.get_ylim()[1] >= 1e4:
                    axes.yaxis.set_major_formatter(FuncFormatter(count))
        legend_below(figure, next(grid[y] for y, lines in lines_by_label.items() if lines is names))
        return to_svg(figure, title=title)


def legend_height(lines: Sequence[Curve]) -> float:
    """Height of the legend in inches."""
    names = {curve.name for curve in lines if curve.name}
    return 0.2 * math.ceil(len(names) / legend_columns(names))


def draw_curves(axes: Axes, lines: Sequence[Curve], *, x: str, y: str) -> None:
    """Draw lines over steps; lines of one name share one entry of the legend."""
    named: set[str] = set()
    for curve in lines:
        look: dict[str, Any] = {"color": colour(curve.look), "linestyle": dash(curve.look)}
        if curve.is_marked:
            is_crowded = len(curve.x) > 25
            look |= {"marker": "o", "markersize": 2.2 if is_crowded else 3.6}
        else:
            look |= {"linewidth": 1.1}
        name = "" if curve.name in named else curve.name
        named.add(curve.name)
        axes.plot(curve.x, curve.y, label=name or "_nolegend_", **look)
        if curve.errors:
            axes.errorbar(
                curve.x,
                curve.y,
                curve.errors,
                color=colour(curve.look),
                fmt="none",
                elinewidth=0.9,
                capsize=2.5,
            )
        if curve.low:
            axes.fill_between(
                curve.x, curve.low, curve.high, color=colour(curve.look), alpha=0.15, linewidth=0
            )
    values = [v for curve in lines for v in curve.y if math.isfinite(v)]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        log_scale(axes, "y")
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.02)


def log_scale(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers as tick labels."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    n_decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if n_decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(count))
    axis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Values of one method by name, with error bars where there are any."""

    name: str
    values: Mapping[str, float]
    errors: Mapping[str, float]


def pictured(
    series: Sequence[Series],
    names: Sequence[str],
    data: Table,
    *,
    title: str,
    caption: str,
    x: str,
    what: str = "task",
) -> Picture | Table:
    """A picture `by_name` with its numbers; these alone if every value is 0 or missing."""
    if any(value and math.isfinite(value) for one in series for value in one.values.values()):
        svg = by_name(series, names, title=title, x=x, what=what)
        return Picture(caption=caption, svg=svg, data=data)
    note = " ".join([data.note, "No value is other than 0."]).strip()
    return replace(data, note=note, is_folded=len(data.rows) > LONGEST)


def by_name(
    series: Sequence[Series], names: Sequence[str], *, title: str, x: str, what: str = "task"
) -> str:
    """Bars (or dots, if bars are too many), one row for every name, the first at the top."""
    has_names = len(names) <= MOST_NAMES
    is_bars = len(names) * len(series) <= MOST_BARS
    per_row = 0.12 * len(series) + 0.09 if is_bars else max(0.2, 0.05 * len(series) + 0.08)
    height = min(TALLEST, max(0.9, per_row * len(names)) if has_names else 5.0) + 0.7
    with style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(names), dtype=float)
        thickness = 0.8 / len(series)
        for number, method in enumerate(series):
            values = np.array([method.values.get(name, math.nan) for name in names])
            spread = np.array([method.errors.get(name, 0.0) for name in names])
            shift = (number - (len(series) - 1) / 2) * thickness
            look: dict[str, Any] = {"color": colour(number), "label": short(method.name)}
            if is_bars:
                axes.barh(rows + shift, np.nan_to_num(values), thickness * 0.88, **look)
                centre, spread_colour = rows + shift, INK
            else:
                centre = rows + (0.5 * shift if has_names else 0.0)
                size = 3.6 if has_names else 1.8
                axes.plot(values, centre, "o", markersize=size, **look)
                spread_colour = colour(number)
            if spread.any():
                axes.errorbar(
                    values, centre, xerr=spread, fmt="none", elinewidth=0.8, color=spread_colour
                )
        axes.set_ylim(len(names) - 0.4, -0.6)
        if has_names:
            axes.set_yticks(rows, [short(name) for name in names])
            axes.tick_params(axis="y", length=0)
        else:
            axes.set_ylabel(f"{counted(len(names), what)}, in the order of the numbers below")
        axes.grid(visible=not is_bars and has_names, axis="y")
        axes.set_xlabel(x)
        if len(series) > 1:
            legend_below(figure, axes)
        return to_svg(figure, title=title)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """A method in the plane of cost and score."""

    name: str
    cost: float
    score: float
    error: float = 0.0


def trade_off(spots: Sequence[Spot], *, title: str, x: str, y: str) -> str:
    """Score against cost, with the Pareto front.

    Many spots get numbers, the cheapest first, and a key below.
    """
    is_numbered = len(spots) > MOST_SPOT_NAMES
    spots = sorted(spots, key=lambda spot: (spot.cost, spot.score)) if is_numbered else spots
    longest = max((len(spot.name) for spot in spots), default=0)
    columns = 2 if longest > 20 else 3  # of the key
    lines = math.ceil(len(spots) / columns) if is_numbered else 0
    with style():
        figure = Figure(figsize=(WIDTH, 3.3 + 0.19 * lines), layout="constrained")
        axes = figure.subplots()
        front = pareto(spots)
        steps = [(spot.cost, spot.score) for spot in front]
        axes.step(*zip(*steps, strict=True), where="post", color=MUTED, linewidth=0.9, zorder=1)
        for spot in spots:
            face = colour(0) if spot in front else PAPER
            axes.errorbar(
                spot.cost,
                spot.score,
                spot.error,
                fmt="o",
                color=colour(0),
                markerfacecolor=face,
                markersize=5,
                elinewidth=0.9,
                capsize=2.5,
                zorder=3,
            )
        axes.margins(x=0.22, y=0.14)
        if len({spot.score for spot in spots}) == 1 and not any(spot.error for spot in spots):
            axes.set_ylim(max(-0.1, spots[0].score - 1.0), spots[0].score + 1.0)
        log_scale(axes, "x")
        axes.set(xlabel=x, ylabel=y)
        names = [spot.name for spot in spots]
        if is_numbered:
            key_below(figure, names, columns)
            names = [str(number) for number in range(1, len(spots) + 1)]
        figure.draw_without_rendering()
        place_names(axes, spots, names)
        return to_svg(figure, title=title)


def key_below(figure: Figure, names: Sequence[str], columns: int) -> None:
    """A key of the numbered spots, from 1 on."""
    labels = [f"{number}  {short(name)}" for number, name in enumerate(names, 1)]
    labels = by_rows(labels, columns)
    handles = [Line2D([], [], linestyle="none") for _ in labels]
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        handlelength=0.0,
        handletextpad=0.0,
    )


def pareto(spots: Sequence[Spot]) -> list[Spot]:
    """The Pareto front: spots that no other one beats in cost and score, cheapest first."""
    front: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: (spot.cost, -spot.score)):
        if not front or spot.score > front[-1].score:
            front.append(spot)
    return front


def place_names(axes: Axes, spots: Sequence[Spot], names: Sequence[str]) -> None:
    """A name to the right of every spot, moved up where it would overlap another."""
    taken: list[tuple[float, float, float]] = []
    for spot, name in sorted(zip(spots, names, strict=True), key=lambda pair: pair[0].score):
        px, py = axes.transData.transform((spot.cost, spot.score))
        text, points = short(name), 72.0 / axes.figure.dpi
        px, py = px * points, py * points
        width, lift = 5.2 * len(text), 0.0
        while any(abs(py + lift - b) < 9.5 and px < r and a < px + width for a, b, r in taken):
            lift += 1.0
        taken.append((px, py + lift, px + width))
        axes.annotate(
            text,
            (spot.cost, spot.score),
            xytext=(6.0, 6.0 + lift),
            textcoords="offset points",
            va="center",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How the values of a heat map become colours."""

    label: str
    low: float
    high: float
    is_signed: bool = False


def heat_map(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    scale: Scale,
    x: str,
    y: str,
) -> str:
    """A matrix as colours, with names beside it where there is room for them."""
    values = np.array(matrix, dtype=float)
    is_square = rows == columns
    has_names = is_square and len(rows) <= MOST_CELL_NAMES and max(map(len, rows)) > 3
    height = 3.2 if has_names else 3.9
    if not is_square:
        height = min(TALLEST, max(1.0, 0.17 * len(rows)) + 0.9)
    with style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=False)
        cells = axes.imshow(
            values,
            cmap="PuOr" if scale.is_signed else "cividis",
            vmin=scale.low,
            vmax=scale.high,
            aspect="equal" if is_square else "auto",
            interpolation="none",
        )
        if has_names:  # names on one axis only, numbers on the other
            rows = [f"{short(name, longest=24)}  {n}" for n, name in enumerate(rows)]
            columns = [str(n) for n in range(len(rows))]
        name_axis(axes, "y", rows, label=y, most=MOST_CELL_NAMES if is_square else MOST_NAMES)
        name_axis(axes, "x", columns, label=x, most=MOST_CELL_NAMES)
        for side in axes.spines.values():
            side.set(visible=True, color=LINE)
        bar = figure.colorbar(cells, ax=axes, shrink=0.7, aspect=18, pad=0.02)
        bar.set_label(scale.label)
        bar.outline.set(linewidth=0.4)
        bar.ax.tick_params(length=2)
        return to_svg(figure, title=title)


def name_axis(axes: Axes, which: str, names: Sequence[str], *, label: str, most: int) -> None:
    """Names along an axis; numbers if there are more than `most`."""
    axis = getattr(axes, f"{which}axis")
    axis.set_label_text(label)
    if len(names) <= most:
        axis.set_ticks(range(len(names)), [short(name, longest=28) for name in names])
        axis.set_tick_params(length=0, labelsize=7.5 if len(names) <= 24 else 6)
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axis.set_label_text(f"{label} (0 to {len(names) - 1}, as in the numbers below)".strip())
