"""A result of a measurement in the terminal: tables, samples, and the sentences that explain it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from receptance.apps.text import visible
from receptance.evaluation.results import Figure, Result
from receptance.progress import say

# What tells figures of one name and task from each other.
_NAMED = ("prefix", "pairs", "length")


def show_result(console: Console, result: Result) -> None:
    """Print figures, curves, the paper's numbers beside ours, samples and notes."""
    say(console, result.what)
    if result.figures:
        console.print(_figures_table(result.figures))
    if result.curves and "bucket edges" in result.curves[0].about:
        console.print(_positions_table(result))
    intervals = [figure.interval for figure in result.figures]
    intervals += [curve.interval for curve in result.curves]
    for interval in filter(None, dict.fromkeys(intervals)):
        say(console, f"- interval: {interval}")
    for model, details in result.details.items():
        if details.get("paper"):
            console.print(_paper_table(model, details["paper"]))
        for task, samples in details.get("harness", {}).get("samples", {}).items():
            _show_samples(console, task, samples)
    for note in result.notes:
        say(console, visible(f"- {note}", one_line=True))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
    return table


def _figures_table(figures: Sequence[Figure]) -> Table:
    table = _table("model", "figure", "value", "95 % interval")
    for figure in figures:
        about = figure.about
        parts = [str(about["task"])] if about.get("task") else []
        if about.get("filter") not in (None, "none"):
            parts.append(str(about["filter"]))
        parts.append(figure.name)
        parts += [
            f"{name} {about[name]}" for name in ("prefix", "pairs", "length") if name in about
        ]
        known = figure.low is not None and figure.high is not None
        reach = f"{_number(figure.low)} to {_number(figure.high)}" if known else ""
        value = f"{_number(figure.value)} {figure.unit}".rstrip()
        table.add_row(str(figure.model), ", ".join(parts), value, reach)
    return table


def _number(value: float | None) -> str:
    """Four decimals, or four digits of a number that is large."""
    assert value is not None
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def _positions_table(result: Result) -> Table:
    models = [str(curve.model) for curve in result.curves]
    table = _table("positions", "", *models)
    edges = result.curves[0].about["bucket edges"]
    for row, (begin, end) in enumerate(pairwise(edges)):
        cells = [
            _cell(curve.y[row], None if curve.high is None else curve.high[row])
            for curve in result.curves
        ]
        table.add_row(f"{begin + 1:,} to {end:,}" if end > begin + 1 else f"{end:,}", "", *cells)
    return table


def _cell(value: float, high: float | None) -> str:
    return f"{value:.4f}" + ("" if high is None else f" ±{high - value:.4f}")


def _paper_table(model: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("paper's column", "model", "here", "printed", "difference")
    for row in rows:
        other = (
            ("", "")
            if row["printed"] is None
            else (f"{row['printed']:.2f}", f"{row['difference']:+.2f}")
        )
        table.add_row(row["column"], model, f"{row['ours']:.2f}", *other)
    return table


def _show_samples(console: Console, task: str, samples: Sequence[dict[str, Any]]) -> None:
    for sample in samples:
        say(console, f"--- {task}, document {sample['doc_id']}, wanted: {sample['target']!r}")
        for arguments, answer in zip(sample["arguments"], sample["filtered_resps"], strict=False):
            say(console, visible(f"{arguments!r} -> {answer!r}", one_line=True))
