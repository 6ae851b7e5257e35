"""Progress bars and messages of commands in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console) -> Progress:
    """Make a progress bar with a note, the elapsed time and the remaining time."""
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
    """Print a line as it is: paths in it are not wrapped, colored or read as markup."""
    console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
