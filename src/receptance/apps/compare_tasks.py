"""receptance compare --task: RWKV and a Transformer on recall, state tracking and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from rich.table import Table

from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.evaluation.results import Figure
from receptance.evaluation.tasks.comparing import TaskOptions, run_task
from receptance.model.devices import resolve_device
from receptance.progress import say
from receptance.sealed import check_outside
from receptance.storage.directories import expanded
from receptance.storage.lock import RunLock
from receptance.training import TrainOptions


@dataclass(frozen=True, kw_only=True)
class _Task(TaskOptions):
    """The options of a task, as the command line shows them."""

    device: str = "auto"
    """Train here: cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    # On the command line these options have no prefix.
    train: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainOptions(steps=2000, batch=64)
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train RWKV and a Transformer of the same budget on a task, and compare their answers.

    The folder gets a file for each run, result.json and pictures; `receptance report` makes a page
    of it. The same command continues after Ctrl-C or a crash.
    """

    COMMON: ClassVar[str] = (
        "--task --out --settings --source --models --widths --layers --learning-rates --seeds "
        "--beyond --steps --batch --device"
    )
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance compare --task mqar --settings pairs=4 --settings pairs=8,length=128",
        "receptance compare --task s5 --widths 64 --widths 128 --seeds 3 --out runs/s5",
        "receptance compare --task images --source fashion-mnist/ --out runs/images",
    )

    out: Path = Path("runs/compare-task")
    """The folder of the comparison."""
    compare: Annotated[_Task, tyro.conf.arg(name="")]


def names_task(argv: list[str]) -> bool:
    """Whether the words of a command line ask for a task instead of text."""
    return any(word.partition("=")[0] == "--task" for word in argv)


def main(argv: list[str]) -> None:
    """Parse, run what is not done yet, report."""
    options = parse(Options, argv, "receptance compare --task NAME")
    console, out = Console(), expanded(options.out)
    check_outside(out)
    device = str(resolve_device(options.compare.device))
    with RunLock(out):
        try:
            found = run_task(replace(options.compare, device=device), out, console)
        except KeyboardInterrupt:
            say(console, f"stopped; the same command goes on with {out}")
            raise
    console.print(_table(found.figures))
    say(console, f"a page of it: receptance report {out} --out {out / 'report.html'}")


def _table(figures: Sequence[Figure]) -> Table:
    """Every figure with its place in the grid and its interval."""
    table = Table("model", "figure", "at", "", "", box=None, pad_edge=False)
    for figure in figures:
        at = ", ".join(f"{n} {x}" for n, x in figure.about.items() if n in ("pairs", "length"))
        known = figure.low is not None and figure.high is not None
        interval = f"{figure.low:.3f} to {figure.high:.3f}" if known else ""
        table.add_row(figure.model or "", figure.name, at, f"{figure.value:.4f}", interval)
    return table
