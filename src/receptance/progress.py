"""Progress bars and messages of commands in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Seconds between two lines, and the share of the time until now that may pass without one.
_OFTENEST, _RAREST, _SHARE = 5.0, 60.0, 0.1


class _Bar(Progress):
    """A bar that prints lines where it cannot be drawn, as in a file; the longer, the fewer."""

    def start(self) -> None:
        super().start()
        self._began = self._last = self.get_time()

    def update(self, task_id: TaskID, *args: Any, **fields: Any) -> None:
        super().update(task_id, *args, **fields)
        now = self.get_time()
        pause = min(_RAREST, max(_OFTENEST, (now - self._began) * _SHARE))
        if self.console.is_terminal or now - self._last < pause:
            return
        self._last = now
        task = self._tasks[task_id]
        left = task.time_remaining
        eta = "-:--:--" if left is None else str(timedelta(seconds=int(left)))
        note = task.fields["note"]
        say(self.console, f"{task.description.strip()} {task.percentage:.0f}%  {note}  eta {eta}")


def progress_bar(console: Console, clock: Callable[[], float] | None = None) -> Progress:
    """Make a progress bar with a note, the elapsed time and the remaining time."""
    return _Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:3.0f}%  {task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        get_time=clock,
    )


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: paths in it are not wrapped, colored or read as markup."""
    console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 layer" and "6,000 layers"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
