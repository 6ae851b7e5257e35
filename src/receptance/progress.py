"""What long work shows in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console) -> Progress:
    """A bar with a note, the time so far and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:3.0f}%  {task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
    )


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line with paths in it: not wrapped, not styled, brackets left alone."""
    console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
