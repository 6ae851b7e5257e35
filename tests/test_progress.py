"""What is said about paths: as it is; and bars where none can be drawn."""

import io
import re

from rich.console import Console

from receptance.progress import counted, progress_bar, say


def test_a_line_is_neither_wrapped_nor_styled():
    line = f"runs/[red]a[/red]/:smile: 12 {'x' * 200}"
    shown = io.StringIO()
    say(Console(file=shown, width=40, force_terminal=True), line)
    assert shown.getvalue() == line + "\n"


def test_a_bar_in_a_file_is_lines_that_become_rarer():
    shown, now = io.StringIO(), 0.0
    with progress_bar(Console(file=shown), clock=lambda: now) as bar:
        task = bar.add_task("training", total=4000, note="")
        for step in range(2001):
            now = float(step)
            bar.update(task, completed=step, note=f"step {step}")
    lines = [line for line in shown.getvalue().splitlines() if "━" not in line]
    steps = [int(re.search(r"step (\d+)", line)[1]) for line in lines]
    assert lines[5] == "training 1%  step 30  eta 1:06:10"
    assert steps[:12] == [*range(5, 55, 5), 56, 63] and steps[-1] - steps[-2] == 60


def test_a_bar_in_a_terminal_prints_no_lines():
    shown, now = io.StringIO(), 0.0
    with progress_bar(Console(file=shown, force_terminal=True), clock=lambda: now) as bar:
        task = bar.add_task("training", total=400, note="")
        for step in range(100):
            now = float(step)
            bar.update(task, completed=step)
    assert "training 8%" not in shown.getvalue()


def test_one_of_a_thing_is_no_plural():
    assert [counted(number, "layer") for number in (0, 1, 6000)] == [
        *("0 layers", "1 layer", "6,000 layers")
    ]
