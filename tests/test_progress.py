"""What is said about paths: as it is."""

import io

from rich.console import Console

from receptance.progress import say


def test_a_line_is_neither_wrapped_nor_styled():
    line = f"runs/[red]a[/red]/:smile: 12 {'x' * 200}"
    shown = io.StringIO()
    say(Console(file=shown, width=40, force_terminal=True), line)
    assert shown.getvalue() == line + "\n"
