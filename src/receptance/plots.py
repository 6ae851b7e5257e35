"""Pictures of losses, decays, curves and matrices, drawn with matplotlib."""

from __future__ import annotations

import json
import math
import mmap
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from receptance.atomic import check_replaceable, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
Buffer = bytes | mmap.mmap

_PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of every PNG
_SNIFFED = 1000  # an SVG says what it is within so many bytes
_VALIDATION = "validation_bits_per_byte"
# A file of up to this many bytes is read whole. In a longer one the lines at _PLACES places are
# read, _BYTES_PER_PLACE at each, and of its validations at most _MOST_VALIDATIONS.
_READ_WHOLE = 1 << 20
_PLACES = 600
_BYTES_PER_PLACE = 1024
_MOST_VALIDATIONS = 5000
# Up to this many points get a mark each; the marks of more would run together.
_MARKED = 100
# An axis has about so many labels.
_LABELS = 24
# A caption is folded to so many columns; up to so many panels stand below each other.
_CAPTION, _STACKED = 130, 3


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draw loss, validation, learning rate and gradient norm of a metrics.jsonl over its tokens.

    A bounded part of a long file is read. The picture is a PNG that replaces an older one as a
    whole. ValueError if there is no training step to draw yet, if a file that is not a PNG is in
    the way, or if matplotlib is not installed.
    """
    figure = _figure()
    records = _records(metrics)
    losses = _points(records, "loss")
    if not losses:
        raise ValueError(f"no training step in {metrics} yet")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    _curve(upper, losses, "training loss, nats per token", "tab:blue")
    _dots(upper.twinx(), _points(records, _VALIDATION), "validation, bits per byte")
    _curve(lower, _positive(_points(records, "gradient_norm")), "gradient norm", "tab:gray")
    lower.set_yscale("log")
    _line(lower.twinx(), _points(records, "learning_rate"), "learning rate", "tab:green")
    lower.set_xlabel("tokens read")
    upper.set_title(picture.resolve().parent.name)
    upper.grid(alpha=0.3)
    _save(figure, picture)


def draw_decays(
    retentions: Mapping[int, Sequence[float]],
    picture: Path,
    *,
    before: Mapping[int, Sequence[float]] | None = None,
) -> None:
    """Draw the share that each channel keeps from a token to the next, layer by layer, as a PNG.

    The channels of a layer stand in descending order, as in figure 10 of arXiv 2305.13048v2. Those
    of `before`, the shares before training, are dotted. ValueError if a file that is not a PNG is
    in the way, or if matplotlib is not installed.
    """
    figure = _figure()
    axes = figure.subplots()
    for layer, shares in sorted(retentions.items()):
        shade = 0.9 * layer / max(1, *retentions)
        color = (shade, 0.2, 1 - shade)
        axes.plot(shares, color=color, linewidth=1, label=f"layer {layer + 1}")
        if before is not None:
            axes.plot(before[layer], ":", color=color, linewidth=1)
    axes.set_xlabel("channels, those that remember longest first")
    axes.set_ylabel("kept from a token to the next, exp(-w)")
    axes.legend(fontsize="x-small", ncols=2)
    axes.grid(alpha=0.3)
    _save(figure, picture)


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
    figure, across = _figure(), 1 if len(panels) <= _STACKED else 2
    down = -(-len(panels) // across)
    figure.set_size_inches(8 * across, 4.5 * down)
    for n, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(down, across, n), panel)
    words = "\n".join(textwrap.wrap(_drawable(caption), _CAPTION * across))
    figure.supxlabel(words, fontsize=7, x=0.01, ha="left", parse_math=False)
    for picture in pictures:
        _save(figure, picture)


def _draw(axes: Axes, panel: Panel) -> None:
    (_draw_curves if panel.matrix is None else _draw_matrix)(axes, panel)
    axes.set_title(panel.title, fontsize="small", wrap=True, parse_math=False)
    axes.set_xlabel(panel.x, parse_math=False)
    axes.set_ylabel(panel.y, parse_math=False)


def _draw_curves(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        style = line.style if len(line.x) <= _MARKED or line.style != "o-" else "-"
        (drawn,) = axes.plot(line.x, line.y, style, label=_drawable(line.label), markersize=3)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.2)
    scales = {True: "log", False: "linear"}
    axes.set(xscale=scales[panel.log_x], yscale=scales[panel.log_y])
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)


def _draw_matrix(axes: Axes, panel: Panel) -> None:
    assert panel.matrix is not None and axes.figure is not None
    low, high = panel.range or (None, None)
    how: dict[str, Any] = {"cmap": "Purples", "aspect": "auto", "interpolation": "nearest"}
    drawn = axes.imshow(panel.matrix, vmin=low, vmax=high, **how)
    axes.set_yticks(range(len(panel.rows)), [_drawable(x) for x in panel.rows], parse_math=False)
    some = range(0, len(panel.columns), max(1, len(panel.columns) // _LABELS))
    axes.set_xticks(some, [_drawable(panel.columns[i]) for i in some], parse_math=False)
    axes.figure.colorbar(drawn, ax=axes, label=panel.unit)


def draw_lines(lines: Sequence[Line], picture: Path, *, x: str, y: str, title: str = "") -> None:
    """Draw curves over each other, with the place x on a logarithmic scale of base 2, as a PNG.

    x and y are the names of the axes. ValueError if a file that is not a PNG is in the way, or if
    matplotlib is not installed.
    """
    figure = _figure()
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
    _save(figure, picture)


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


def check_picture(path: Path) -> None:
    """ValueError if something at path is not of the kind of picture that would replace it."""
    kind = "an SVG" if path.suffix == ".svg" else "a PNG"
    check_replaceable(path, "the picture", kind, _is_svg if kind == "an SVG" else _is_png)


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_PNG)) == _PNG


def _is_svg(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<svg" in file.read(_SNIFFED)


def _drawable(text: str) -> str:
    """The text with characters that the font of pictures lacks as escapes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(
        c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text
    )


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("no plot without matplotlib: pip install matplotlib") from None
    return Figure(figsize=(8, 6), layout="constrained")


def _save(figure: Figure, picture: Path) -> None:
    check_picture(picture)
    if picture.suffix != ".svg":
        with written(picture) as file:
            figure.savefig(file, format="png", dpi=120)
        return
    from matplotlib import rc_context

    # The same figures make the same file: no date, and no names drawn at random.
    with written(picture) as file, rc_context({"svg.hashsalt": "receptance"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def _curve(axes: Axes, points: Points, label: str, color: str) -> None:
    """Draw all points faintly, and their moving mean."""
    axes.plot(*_columns(points), color=color, alpha=0.35, linewidth=0.8)
    _line(axes, _smooth(points), label, color)


def _line(axes: Axes, points: Points, label: str, color: str) -> None:
    axes.plot(*_columns(points), color=color)
    axes.set_ylabel(label, color=color)


def _dots(axes: Axes, points: Points, label: str, color: str = "tab:orange") -> None:
    axes.plot(*_columns(points), "o-" if len(points) <= _MARKED else "-", color=color, markersize=3)
    axes.set_ylabel(label if points else "", color=color)
    if not points:
        axes.set_yticks([])


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [at for at, _ in points], [value for _, value in points]


def _points(records: Iterable[Mapping[str, Any]], name: str) -> Points:
    """(tokens, value) of the records that have both as numbers, in the order of tokens.

    Of a step that was repeated, as after a rollback, the last record counts.
    """
    found = ((record.get("tokens"), record.get(name)) for record in records)
    latest = {float(at): float(y) for at, y in found if _is_number(at) and _is_number(y)}
    return sorted(latest.items())


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _positive(points: Points) -> Points:
    return [(at, value) for at, value in points if value > 0]


def _smooth(points: Points) -> Points:
    """The exponential mean of the points, with a memory of a fiftieth of the run."""
    keep = 1 - 1 / max(1, len(points) // 50)
    mean, out = points[0][1] if points else 0.0, []
    for at, value in points:
        mean = keep * mean + (1 - keep) * value
        out.append((at, mean))
    return out


def _records(metrics: Path) -> list[dict[str, Any]]:
    """The records of a file, or a selection of many from all over it; other lines are skipped."""
    if metrics.stat().st_size <= _READ_WHOLE:
        return list(_parsed(metrics.read_bytes()))
    with (
        metrics.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return [*_sampled(content), *_validations(content)]


def _sampled(content: Buffer) -> Iterator[dict[str, Any]]:
    """Training steps from places all over the file, with its first and its last line."""
    last = len(content) - _BYTES_PER_PLACE
    for place in range(_PLACES):
        at = last * place // (_PLACES - 1)
        begin = content.rfind(b"\n", 0, at) + 1
        for record in _parsed(content[begin : at + _BYTES_PER_PLACE]):
            if _VALIDATION not in record:
                yield record


def _validations(content: Buffer) -> Iterator[dict[str, Any]]:
    """The records of validations, except for those that lie closer than a picture can show."""
    needle, stride = b'"' + _VALIDATION.encode() + b'"', len(content) // _MOST_VALIDATIONS
    at = content.find(needle)
    while at >= 0:
        begin, end = content.rfind(b"\n", 0, at) + 1, content.find(b"\n", at) + 1
        if not end:
            return
        yield from _parsed(content[begin:end])
        at = content.find(needle, max(end, begin + stride))


def _parsed(lines: bytes) -> Iterator[dict[str, Any]]:
    """The objects on whole lines; the last line may be half written and is then skipped."""
    for line in lines.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
