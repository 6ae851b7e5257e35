"""receptance verify: check that a model computes the right logits on this machine."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from rich.table import Column, Table
from rich.text import Text

from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.apps.text import visible
from receptance.apps.waiting import waiting
from receptance.checking.recorded import beside
from receptance.checking.verifying import Check, Subject, record, verify
from receptance.progress import progress_bar, say

_PIPED_WIDTH = 160
"""The width of a table that is not for a terminal; each check then has one line, for `grep`."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check a model on this machine: parallel = recurrent = batched, every kernel and engine.

    The exit code is 0 if all checks pass, 1 if one fails, and 2 if there is no model to check.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = ("receptance verify runs/mine",)

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model, as for `receptance generate`; it does not need a tokenizer."""
    record: bool = False
    """Write the logits of fixed tokens beside the model, for other machines to compare with."""
    logits: Path | None = None
    """Compare with the recorded logits in this file instead of MODEL.logits."""
    device: str = "cpu"
    """Run the torch model on this device: cpu, cuda, ... On cuda the GPU engine is checked too."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str]) -> None:
    """Parse, check, report; leave with exit code 1 if a check failed."""
    options = parse(Options, argv, "receptance verify")
    with waiting(f"reading {options.model}"):
        subject = Subject.open(options.model)
    file = options.logits or beside(subject.path)
    if options.record:
        record(subject, file)
    checks = _checked(options, subject)
    if options.json:
        print(json.dumps(as_json(subject, checks), indent=1))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = _PIPED_WIDTH
        console.print(table(checks))
        if options.record:
            say(console, f"recorded {file}")
    if not all(check.passed for check in checks):
        raise SystemExit(1)


def _checked(options: Options, subject: Subject) -> list[Check]:
    checks = []
    console = Console(stderr=True)
    console.quiet = options.json or not console.is_terminal
    with progress_bar(console) as bar:
        task = bar.add_task("verify", total=None, note="")
        for check in verify(subject, options.logits, options.device):
            checks.append(check)
            bar.update(task, advance=1, note=check.what)
        bar.remove_task(task)
    return checks


def table(checks: list[Check]) -> Table:
    """The table of results, with a row for each check."""
    shown = Table(Column("check", no_wrap=True), box=None, pad_edge=False)
    for title in ("difference", "bound"):
        shown.add_column(title, justify="right")
    shown.add_column("")
    shown.add_column("")
    for check in checks:
        verdict = Text("pass", "green") if check.passed else Text("FAIL", "bold red")
        row = Text(visible(check.what, one_line=True)), _short(check.measured), _short(check.bound)
        shown.add_row(*row, verdict, Text(visible(check.note, one_line=True)))
    return shown


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == round(value, 0) and math.isfinite(value) else f"{value:.1e}"


def as_json(subject: Subject, checks: list[Check]) -> dict[str, Any]:
    """The results for JSON, which has no number for a difference that is not finite: it is null."""
    rows = [
        {
            "check": check.what,
            "difference": check.measured if math.isfinite(check.measured) else None,
            "bound": check.bound,
            "passed": check.passed,
            "note": check.note,
        }
        for check in checks
    ]
    passed = all(check.passed for check in checks)
    about = {"model": str(subject.path), "fingerprint": subject.fingerprint, "stored": subject.kind}
    return about | {"passed": passed, "checks": rows}
