"""A page of all results in a folder: tables with intervals, charts, what was run, and on what.

The page is one file without scripts that loads nothing, and follows the reader's light or dark
colors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from receptance.atomic import check_replaceable, written
from receptance.errors import one_line
from receptance.evaluation.drawing import STYLE, charts
from receptance.evaluation.results import FORMAT, Figure, Result
from receptance.storage.directories import expanded

_MARK = "<!-- receptance report -->"
# The page may load nothing at all; its pictures are a part of it.
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
# The format of a result stands within so many bytes of its beginning.
_SNIFFED = 200
# An interval that is narrower than this share of its ends comes from rounding.
_ROUNDING = 1e-12


def _colors(ink: str, quiet: str, link: str, paper: str, shade: str, soft: str) -> str:
    """The rules that color the page."""
    return (
        f"body {{ color: {ink}; background: {paper}; }} a {{ color: {link}; }}\n"
        f".quiet, small {{ color: {quiet}; }} th, pre {{ background: {shade}; }}\n"
        f"th, td {{ border-bottom: 1px solid {soft}; }}\n"
    )


_PAGE_STYLE = (
    ":root { color-scheme: light dark; }\n"
    + _colors("#1c2430", "#5a6675", "#0a5fb4", "#ffffff", "#f4f6f8", "#d5dae1")
    + "@media (prefers-color-scheme: dark) {\n"
    + _colors("#e3e8ef", "#a3aebb", "#6cb6ff", "#14181f", "#1d232d", "#3a4352")
    + """}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
.quiet, small { font-size: 0.85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: left;
  vertical-align: top; }
th { max-width: 12rem; } th + th { min-width: 4.5rem; }
td.number { text-align: right; white-space: nowrap; }
td small { display: block; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.charts svg { width: 100%; height: auto; max-width: 40rem; }
details { margin: 0.5rem 0; } summary { cursor: pointer; }
pre { padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; }
li, p, h2 { overflow-wrap: anywhere; }
"""
)


def find_results(folder: str | Path) -> tuple[dict[Path, Result], dict[Path, str]]:
    """The results below a folder, or in one file, and why others of them cannot be read.

    JSON of other kinds is passed over. ValueError if there is no such folder or no result in it.
    """
    root = expanded(folder)
    if not str(folder) or not root.exists():
        raise ValueError(f"there is no folder {root}; name one with results")
    files = sorted(root.rglob("*.json")) if root.is_dir() else [root]
    found: dict[Path, Result] = {}
    unread: dict[Path, str] = {}
    for path in files:
        if root.is_dir() and not _looks_like_result(path):
            continue
        try:
            found[path] = Result.load(path)
        except ValueError as error:
            unread[path] = str(error)
    if not found:
        reason = f": {next(iter(unread.values()))}" if unread else ""
        raise ValueError(f"no result of a measurement in {root}{reason}")
    return found, unread


def _looks_like_result(path: Path) -> bool:
    if not path.is_file():  # opening a pipe would wait for one who writes
        return False
    try:
        with path.open("rb") as file:
            return FORMAT.encode() in file.read(_SNIFFED)
    except OSError:
        return False


class Page:
    """How a page tells results. A subclass knows more of some kinds of them."""

    STYLE: ClassVar[str] = ""
    """Rules of style beside those of all pages."""

    def arranged(self, results: Mapping[str, Result]) -> dict[str, Result]:
        """The results in the order of the page."""
        return dict(results)

    def front(self, results: Mapping[str, Result]) -> Iterator[str]:
        """What stands above all, after the heading: a list of the results."""
        if len(results) > 1:
            items = (
                f'<li><a href="#r{n}">{text(result.what)}</a> <small>{text(name)}</small></li>'
                for n, (name, result) in enumerate(results.items())
            )
            yield f"<ul>{''.join(items)}</ul>"

    def section(self, name: str, result: Result) -> Iterator[str]:
        """What is said of the result in the file of this name."""
        yield from head(name, result)
        if result.notes:
            yield "<ul>" + "".join(f"<li>{text(note)}</li>" for note in result.notes) + "</ul>"
        yield from tables(result)
        yield from drawn(result)
        yield from origin(result)


def write_report(folder: str | Path, out: str | Path, how: Page | None = None) -> dict[Path, str]:
    """Write the page of all results below a folder, and return those that cannot be read.

    ValueError if there is no result, or if something else than such a page is at out.
    """
    found, unread = find_results(folder)
    path, root = expanded(out), expanded(folder)
    check_replaceable(path, "the report", "a report", _is_report)
    named = {str(_below(file, root)): result for file, result in found.items()}
    content = page(named, unread, how)
    with one_line(path, "the report to "), written(path) as file:
        file.write(content.encode(errors="backslashreplace"))
    return unread


def _below(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path != root else Path(path.name)


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK.encode() in file.read(_SNIFFED)


def page(results: Mapping[str, Result], unread: Mapping[Path, str], how: Page | None = None) -> str:
    """The page of results by the names of their files."""
    how = how or Page()
    results = how.arranged(results)
    body = ["<h1>Results</h1>", *how.front(results)]
    for n, (name, result) in enumerate(results.items()):
        body += [f'<section id="r{n}">', *how.section(name, result), "</section>"]
    if unread:
        body.append("<h2>Not read</h2>")
        body.append("<ul>" + "".join(f"<li>{text(why)}</li>" for why in unread.values()) + "</ul>")
    return (
        f'<!doctype html>\n{_MARK}\n<html lang="en"><head><meta charset="utf-8">{_POLICY}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Results</title><style>{_PAGE_STYLE}{STYLE}{how.STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def head(name: str, result: Result) -> Iterator[str]:
    """The heading of a result, and what it is."""
    yield f"<h2>{text(result.what)}</h2>"
    seed = "" if result.seed is None else f", seed {result.seed}"
    took = "" if result.seconds is None else f", {_duration(result.seconds)}"
    yield f'<p class="quiet">{text(result.kind)}{seed}{took}; {text(name)}</p>'


def tables(result: Result) -> Iterator[str]:
    """All figures."""
    for figures in _tables(result.figures):
        yield from _figure_table(figures)


def drawn(result: Result) -> Iterator[str]:
    """All curves, as charts."""
    if found := charts(result):
        yield '<div class="charts">' + "".join(chart.svg() for chart in found) + "</div>"
        named = dict.fromkeys(f"{x.name}: {x.interval}" for x in result.curves if x.interval)
        if named:
            yield f'<p class="quiet">Intervals in the charts: {text("; ".join(named))}.</p>'


def origin(result: Result) -> Iterator[str]:
    """Models, data, machine, options and details."""
    if result.models:
        yield "<h3>Models</h3>"
        yield from _things((x.name, x.fingerprint, x.about) for x in result.models)
    if result.data:
        yield "<h3>Data</h3>"
        yield from _things((x.name, x.digest, x.about) for x in result.data)
    yield "<h3>Machine and versions</h3>"
    yield from _things([("", None, {**result.machine, **result.versions})])
    for title, content in (("Options", result.options), ("Details", result.details)):
        if content:
            shown = json.dumps(content, indent=1, ensure_ascii=False)
            yield f"<details><summary>{title}</summary><pre>{text(shown)}</pre></details>"


# ---- tables -------------------------------------------------------------------------------------


def _tables(figures: Sequence[Figure]) -> list[list[Figure]]:
    """The figures by the names of what they are about: each table has its own columns."""
    tables: dict[tuple[bool, ...] | tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        tables.setdefault((str(figure.model is None), *figure.about), []).append(figure)
    return list(tables.values())


def _figure_table(figures: Sequence[Figure]) -> Iterator[str]:
    """A row for each model and what was measured of it, a column for each kind of figure."""
    keys = list(figures[0].about)
    columns = list(dict.fromkeys((x.name, x.unit) for x in figures))
    rows: dict[str, dict[tuple[str, str], list[Figure]]] = {}
    heads: dict[str, list[str]] = {}
    for figure in figures:
        head = [figure.model or "", *(_value(figure.about[key]) for key in keys)]
        row = json.dumps(head)
        heads[row] = head
        rows.setdefault(row, {}).setdefault((figure.name, figure.unit), []).append(figure)
    skip = 0 if any(x.model for x in figures) else 1
    titles = ["model", *keys][skip:]
    names = [*titles, *(name if unit in name else f"{name}, {unit}" for name, unit in columns)]
    yield '<div class="wide"><table><thead><tr>'
    yield from (f"<th>{text(name)}</th>" for name in names)
    yield "</tr></thead><tbody>"
    for row, cells in rows.items():
        yield "<tr>" + "".join(f"<td>{text(word)}</td>" for word in heads[row][skip:])
        for column in columns:
            inside = "<br>".join(map(_cell, cells.get(column, ())))
            yield f'<td class="number">{inside}</td>'
        yield "</tr>"
    yield "</tbody></table></div>"
    for name, _ in columns:
        named = dict.fromkeys(x.interval for x in figures if x.name == name and x.interval)
        if named:
            yield f"<small>{text(name)}: interval {text('; '.join(named))}.</small><br>"


def _cell(figure: Figure) -> str:
    """The value with its interval, to as many digits as the interval makes sense of."""
    low, high = figure.low, figure.high
    if low is None or high is None:
        return _number(figure.value)
    half, three = (high - low) / 2, (figure.value, low, high)
    if math.isfinite(half) and half > _ROUNDING * max(map(abs, three)):
        places = min(8, max(0, 1 - math.floor(math.log10(half))))
        shown = [f"{x:z,.{places}f}" for x in three]
    else:
        shown = [_number(x) for x in three]
    return f"{shown[0]}<small>{shown[1]} … {shown[2]}</small>"


def _number(value: float) -> str:
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _things(things: Iterable[tuple[str, str | None, Mapping[str, Any]]]) -> Iterator[str]:
    """A table of things with names, digests and properties, one row for each."""
    rows = list(things)
    keys = list(dict.fromkeys(key for _, _, about in rows for key in about))
    named, sealed = any(name for name, _, _ in rows), any(digest for _, digest, _ in rows)
    heads = [*(["name"] if named else []), *keys, *(["digest"] if sealed else [])]
    yield '<div class="wide"><table><thead><tr>'
    yield from (f"<th>{text(head)}</th>" for head in heads)
    yield "</tr></thead><tbody>"
    for name, digest, about in rows:
        cells = [*([name] if named else []), *(_value(about.get(key)) for key in keys)]
        cells += [digest[:16] if digest else ""] if sealed else []
        yield "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table></div>"


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def text(value: str) -> str:
    """A text as it stands in a page."""
    return escape(value)
