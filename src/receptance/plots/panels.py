"""Pictures of panels: curves with their intervals, and matrices, with a caption."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from receptance.plots.pictures import drawable, new_figure, save, save_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Up to this many points get a mark each; the marks of more would run together.
_MARKED = 100
# An axis has about so many labels.
_LABELS = 24
# A caption is folded to so many columns; up to so many panels stand below each other.
_CAPTION, _STACKED = 130, 3
# The size in inches of a panel that stands alone.
_ALONE = 4.8, 4.0
_COLORS = "bgrcmykC"  # what a style that names a color begins with
# A logarithmic axis is labeled at up to so many places that lie apart by this factor. Over less
# than _FINE it is labeled at 1, 2 and 5 as well, over more than _DECADES as powers of ten.
_NAMED, _APART, _FINE, _DECADES = 8, 1.3, 1e3, 1e7


@dataclass(frozen=True)
class Line:
    """A curve, and the ends of the interval around each of its points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: str = "o-"
    """As matplotlib names it: "o-" for marks that a line joins, "o" for marks, "--" for dashes."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One part of a picture: curves, or a matrix that is dark where it is large."""

    title: str
    x: str
    y: str
    lines: Sequence[Line] = ()
    log_x: bool = False
    log_y: bool = False
    matrix: Sequence[Sequence[float]] | None = None
    """Rows from top to bottom, each from left to right."""
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    unit: str = ""
    """That of the matrix."""
    range: tuple[float, float] | None = None
    """Its values that are white and darkest; None are the least and the largest."""


def draw_panels(panels: Sequence[Panel], pictures: Sequence[Path], caption: str) -> None:
    """Draw panels and a caption in files of the kinds that their names say, PNG or SVG.

    ValueError if a file that is no picture is in the way, or if matplotlib is not installed.
    """
    figure, across = new_figure(), 1 if len(panels) <= _STACKED else 2
    down, colors = -(-len(panels) // across), _colors(panels)
    figure.set_size_inches(8 * across, 4.5 * down)
    for n, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(down, across, n)
        _draw(axes, panel, colors)
        if panel.matrix is None:
            axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    words = "\n".join(textwrap.wrap(drawable(caption), _CAPTION * across))
    figure.supxlabel(words, fontsize=7, x=0.01, ha="left", parse_math=False)
    for picture in pictures:
        save(figure, picture)


def panel_pictures(panels: Sequence[Panel]) -> list[bytes]:
    """Each panel as an SVG of its own that can be read on a telephone, its legend below it.

    ValueError if matplotlib is not installed.
    """
    colors, made = _colors(panels), []
    for panel in panels:
        figure = new_figure()
        figure.set_size_inches(*_ALONE)
        _draw(figure.subplots(), panel, colors)
        if panel.matrix is None:
            figure.legend(fontsize="small", loc="outside lower left", ncols=2)
        file = io.BytesIO()
        save_svg(figure, file)
        made.append(file.getvalue())
    return made


def _colors(panels: Sequence[Panel]) -> dict[str, str]:
    """A color for each label, the same in all panels."""
    labels = dict.fromkeys(line.label for panel in panels for line in panel.lines)
    return {label: f"C{n % 10}" for n, label in enumerate(labels)}


def _draw(axes: Axes, panel: Panel, colors: Mapping[str, str]) -> None:
    if panel.matrix is None:
        _draw_curves(axes, panel, colors)
    else:
        _draw_matrix(axes, panel)
    axes.set_title(panel.title, fontsize="small", wrap=True, parse_math=False)
    axes.set_xlabel(panel.x, parse_math=False)
    axes.set_ylabel(panel.y, parse_math=False)


def _draw_curves(axes: Axes, panel: Panel, colors: Mapping[str, str]) -> None:
    for line in panel.lines:
        style = line.style if len(line.x) <= _MARKED or line.style != "o-" else "-"
        if style[0] not in _COLORS:
            style = colors[line.label] + style
        (drawn,) = axes.plot(line.x, line.y, style, label=drawable(line.label), markersize=3)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.2)
    scales = {True: "log", False: "linear"}
    axes.set(xscale=scales[panel.log_x], yscale=scales[panel.log_y])
    if panel.log_x:
        _label_logarithmic(axes.xaxis, sorted({x for line in panel.lines for x in line.x}))
    if panel.log_y:
        _label_logarithmic(axes.yaxis, axes.get_ylim())
    axes.grid(alpha=0.3)


def _label_logarithmic(axis: Axis, places: Sequence[float]) -> None:
    """Label the places themselves if they are few and apart, otherwise round numbers, in full."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ratio = places[-1] / places[0]
    if ratio > _DECADES:
        return
    apart = min((b / a for a, b in itertools.pairwise(places)), default=0.0)
    few = 2 < len(places) <= _NAMED and apart > _APART
    if few:
        axis.set_ticks(list(places))
    else:
        factors = (1, 2, 5) if ratio < _FINE else (1,)
        axis.set_major_locator(LogLocator(subs=factors))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: _short(value)))


def _short(value: float) -> str:
    """A number as short as a tick needs it: 20k, 169M, 0.002."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}"


def _draw_matrix(axes: Axes, panel: Panel) -> None:
    assert panel.matrix is not None and axes.figure is not None
    low, high = panel.range or (None, None)
    how: dict[str, Any] = {"cmap": "Purples", "aspect": "auto", "interpolation": "nearest"}
    drawn = axes.imshow(panel.matrix, vmin=low, vmax=high, **how)
    axes.set_yticks(range(len(panel.rows)), [drawable(x) for x in panel.rows], parse_math=False)
    some = range(0, len(panel.columns), max(1, len(panel.columns) // _LABELS))
    axes.set_xticks(some, [drawable(panel.columns[i]) for i in some], parse_math=False)
    axes.figure.colorbar(drawn, ax=axes, label=panel.unit)


def draw_lines(lines: Sequence[Line], picture: Path, *, x: str, y: str, title: str = "") -> None:
    """Draw curves over each other, with the place x on a logarithmic scale of base 2, as a PNG.

    x and y are the names of the axes. ValueError if a file that is not a PNG is in the way, or if
    matplotlib is not installed.
    """
    figure = new_figure()
    axes = figure.subplots()
    for line in lines:
        (drawn,) = axes.plot(line.x, line.y, "o-", label=line.label, markersize=3)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize="small")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, picture)


def draw_heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    picture: Path,
    *,
    title: str,
    row_name: str,
    column_name: str,
    unit: str,
) -> None:
    """Draw a matrix as a PNG, a row of it from left to right, dark where it is large.

    ValueError if a file that is not a PNG is in the way, or if matplotlib is not installed.
    """
    panel = Panel(title=title, x=column_name, y=row_name, unit=unit)
    draw_panels([replace(panel, matrix=values, rows=rows, columns=columns)], [picture], "")
