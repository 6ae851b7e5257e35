"""receptance report: a page of all results in a folder, to be opened in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.apps.paper import PaperPage
from receptance.evaluation.report import write_report
from receptance.progress import say


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make a page of all results of measurements in a folder.

    It is one file with tables, intervals and charts, and loads nothing from elsewhere.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = ("receptance report runs/quick --out quick.html",)

    results: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The folder with the results, below which all are found; or the file of one."""
    out: Path = Path("report.html")
    """Write this page."""


def main(argv: list[str]) -> None:
    """Parse, write the page, say what was left out."""
    options = parse(Options, argv, "receptance report")
    console = Console()
    for reason in write_report(options.results, options.out, PaperPage()).values():
        say(console, f"left out: {reason}", style="bold yellow")
    say(console, f"report: {options.out}")
