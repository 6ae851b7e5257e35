"""Charts of curves as SVG, drawn from a result alone and without another library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from receptance.evaluation.results import Curve, Result

# Sizes in the units of the picture, which a page scales.
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 34, 46
_LINE, _CHARACTER = 18, 6.4
# A chart has at most so many curves; more are divided by what tells them apart.
_MOST_CURVES = 6
# Values that range over such a factor are drawn on a logarithmic axis, across and upwards.
_WIDE_ACROSS, _WIDE_UP = 8, 30
# Up to this many intervals are drawn as bars, more as a band.
_BARS = 10
_TICKS = 5


def _colors(ink: str, soft: str, paper: str, curves: Sequence[str]) -> str:
    """The rules that color a chart: text, grid, background, and each curve."""
    rules = [f".chart text {{ fill: {ink}; }}", f".chart .grid {{ stroke: {soft}; }}"]
    rules.append(f".chart .paper {{ fill: {paper}; }}")
    for n, color in enumerate(curves):
        rules.append(f".chart .s{n} {{ stroke: {color}; fill: {color}; }}")
    return "\n".join(rules) + "\n"


_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
_LIGHT = ("#0a5fb4", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490")
_DARK = ("#6cb6ff", "#ff9f6b", "#6ee7a0", "#c4a7ff", "#fbbf24", "#67e8f9")
STYLE = (
    ".chart { font: 12px system-ui, sans-serif; }\n"
    + _colors("#1c2430", "#d5dae1", "#ffffff", _LIGHT)
    + "@media (prefers-color-scheme: dark) {\n"
    + _colors("#e3e8ef", "#3a4352", "#14181f", _DARK)
    + """}
.chart .title { font-weight: 600; font-size: 13px; }
.chart .grid { stroke-width: 1; }
.chart path.curve { fill: none; stroke-width: 2; }
.chart path.bar { stroke-width: 1.5; }
.chart path.band { stroke: none; fill-opacity: 0.15; }
"""
    + "".join(f".chart .curve.s{n} {{ stroke-dasharray: {d}; }}\n" for n, d in enumerate(_DASHES))
)
"""The style of charts, in the light or dark colors that the reader prefers."""


@dataclass(frozen=True)
class Chart:
    """Curves that belong into one picture."""

    title: str
    curves: list[Curve]
    labels: list[str]

    def svg(self, *, alone: bool = False) -> str:
        """The picture. One that stands alone has its own style, in the colors of the reader."""
        return _drawn(self, alone)


def charts(result: Result) -> list[Chart]:
    """The charts of a result: one for each kind of curve, or for each part of what it is about."""
    return [part for kind in kinds(result) for part in _divided(kind.title, kind.curves)]


def kinds(result: Result) -> list[Chart]:
    """The charts of a result with all curves of a kind in one, however many these are."""
    found: dict[tuple[str, str, str], list[Curve]] = {}
    for curve in result.curves:
        if _places(curve):
            found.setdefault((curve.name, curve.x_name, curve.y_name), []).append(curve)
    return [Chart(name, some, _labels(some)) for (name, *_), some in found.items()]


def _divided(name: str, curves: list[Curve]) -> Iterator[Chart]:
    """One chart if the curves are few or cannot be told apart, otherwise one for each part."""
    parts: dict[str, list[Curve]] = {}
    for curve in curves:
        parts.setdefault(_about(curve, curves), []).append(curve)
    if len(curves) <= _MOST_CURVES or len(parts) == 1:
        parts = {"": curves}
    for about, part in parts.items():
        title = f"{name} ({about})" if about else name
        for at in range(0, len(part), _MOST_CURVES):
            some = part[at : at + _MOST_CURVES]
            yield Chart(title, some, _labels(some))


def _labels(curves: Sequence[Curve]) -> list[str]:
    """The models of curves, and what they are about if that is needed to tell them apart."""
    labels = [curve.model or curve.name for curve in curves]
    if len(set(labels)) == len(labels):
        return labels
    return [
        f"{label}, {more}" if (more := _about(curve, curves)) else label
        for label, curve in zip(labels, curves, strict=True)
    ]


def _about(curve: Curve, among: Sequence[Curve]) -> str:
    """What a curve is about, without what is the same for all curves among which it stands."""
    return ", ".join(
        f"{name} {value}"
        for name, value in curve.about.items()
        if any(other.about.get(name) != value for other in among)
    )


def _places(curve: Curve) -> list[int]:
    """The places of a curve that can be drawn."""
    pairs = enumerate(zip(curve.x, curve.y, strict=True))
    return [n for n, (x, y) in pairs if math.isfinite(x) and math.isfinite(y)]


# ---- axes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """A range of values, and where they lie in the picture."""

    low: float
    high: float
    logarithmic: bool
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (self._scaled(x) for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self) -> list[float]:
        """Round values within the range."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5)):
                found = [f * 10.0**n for n in decades for f in factors]
                found = [x for x in found if self.low <= x <= self.high]
                if len(found) >= 3:
                    break
            return found[:: math.ceil(len(found) / (_TICKS + 2))]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / _TICKS))
        step *= next(f for f in (1, 2, 5, 10) if (self.high - self.low) / (f * step) <= _TICKS)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [n * step for n in range(first, last + 1)]


def is_wide(chart: Chart) -> tuple[bool, bool]:
    """Whether the places and the values of a chart need logarithmic axes."""
    xs, ys = _extent(chart)
    return _ranges(xs, _WIDE_ACROSS), _ranges(ys, _WIDE_UP)


def _ranges(values: Sequence[float], factor: float) -> bool:
    return min(values) > 0 and max(values) / min(values) >= factor


def _extent(chart: Chart) -> tuple[list[float], list[float]]:
    """All places, and all values with the ends of their intervals."""
    xs, ys = [], []
    for curve in chart.curves:
        for n in _places(curve):
            xs.append(curve.x[n])
            ys += [curve.y[n], *_spread(curve, n)]
    return xs, ys


def _axis(values: Sequence[float], start: float, end: float, wide: float) -> _Axis:
    low, high = min(values), max(values)
    logarithmic = _ranges(values, wide)
    if logarithmic:
        margin = (high / low) ** 0.03
        return _Axis(low / margin, high * margin, True, start, end)
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return _Axis(low - margin, high + margin, False, start, end)


def number(value: float) -> str:
    """A number as short as a tick of an axis needs it: 20k, 1.5M, 0.002."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


# ---- the picture --------------------------------------------------------------------------------


def _drawn(chart: Chart, alone: bool) -> str:
    legend = _legend(chart.labels)
    height = _HEIGHT + _LINE * (1 + max(row for row, _, _ in legend))
    xs, ys = _extent(chart)
    across = _axis(xs, _LEFT, _WIDTH - _RIGHT, _WIDE_ACROSS)
    up = _axis(ys, _HEIGHT - _BOTTOM, _TOP, _WIDE_UP)
    name = chart.curves[0]
    parts = [*_grid(across, up, name.x_name, name.y_name)]
    for n, curve in enumerate(chart.curves):
        parts += _line(curve, across, up, f"s{n % _MOST_CURVES}")
    for n, (row, x, label) in enumerate(legend):
        y = _HEIGHT + _LINE * row
        color = f"s{n % _MOST_CURVES}"
        parts.append(f'<path class="curve {color}" d="M{x} {y}h22"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{escape(label)}</text>')
    title = escape(chart.title)
    parts.insert(0, f'<text class="title" x="4" y="16">{title}</text>')
    if alone:
        parts.insert(0, f"<style>{STYLE}</style>")
        parts.insert(1, '<rect class="paper" width="100%" height="100%"/>')
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" '
        f'viewBox="0 0 {_WIDTH} {height}">' + "".join(parts) + "</svg>"
    )


def _legend(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """Row, place and text of each label; a row takes as many as fit."""
    found, row, x = [], 0, 8
    for label in labels:
        width = 42 + round(_CHARACTER * len(label))
        if x > 8 and x + width > _WIDTH:
            row, x = row + 1, 8
        found.append((row, x, label))
        x += width
    return found


def _grid(across: _Axis, up: _Axis, x_name: str, y_name: str) -> Iterator[str]:
    for value in up.ticks():
        y = up.at(value)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    for value in across.ticks():
        x, y = across.at(value), _HEIGHT - _BOTTOM
        yield f'<path class="grid" d="M{x:.1f} {_TOP}V{y}"/>'
        yield f'<text x="{x:.1f}" y="{y + 16}" text-anchor="middle">{number(value)}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    y = _HEIGHT - _BOTTOM + 33
    yield f'<text x="{middle}" y="{y}" text-anchor="middle">{escape(x_name)}</text>'
    yield f'<text x="4" y="{_TOP - 5}" style="font-size: 11px">{escape(y_name)}</text>'


def _spread(curve: Curve, n: int) -> list[float]:
    """The interval at a place, if there is one."""
    if curve.low is None or curve.high is None:
        return []
    return [x for x in (curve.low[n], curve.high[n]) if math.isfinite(x)]


def _line(curve: Curve, across: _Axis, up: _Axis, color: str) -> Iterator[str]:
    """A curve with its intervals: as bars if there are few, otherwise as a band."""
    places = sorted(_places(curve), key=lambda n: curve.x[n])
    points = [(across.at(curve.x[n]), up.at(curve.y[n])) for n in places]
    wide = [n for n in places if len(_spread(curve, n)) == 2]

    def path(pairs: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pairs)

    def end(which: Callable[[Sequence[float]], float]) -> list[tuple[float, float]]:
        return [(across.at(curve.x[n]), up.at(which(_spread(curve, n)))) for n in wide]

    if len(wide) > _BARS:
        yield f'<path class="band {color}" d="{path([*end(min), *reversed(end(max))])}Z"/>'
    else:
        for (x, low), (_, high) in zip(end(min), end(max), strict=True):
            d = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
            yield f'<path class="bar {color}" d="{d}"/>'
    yield f'<path class="curve {color}" d="{path(points)}"/>'
    if len(points) <= _BARS:
        for x, y in points:
            yield f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'


def file_names(found: Sequence[Chart]) -> list[str]:
    """A name for the file of each chart, made of its title."""
    names: list[str] = []
    for chart in found:
        words = "".join(c if c.isalnum() else " " for c in chart.title.lower()).split()
        stem = "-".join(words)[:80] or "chart"
        numbers = (f"{stem}-{n}" for n in itertools.count(2))
        names.append(next(x for x in itertools.chain([stem], numbers) if x not in names))
    return [f"{name}.svg" for name in names]
