"""receptance reproduce: run the paper's experiments, and say whether the findings agree."""

from __future__ import annotations

import difflib
import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from receptance.apps.console import Console
from receptance.apps.gallery import ELSEWHERE, write_gallery
from receptance.apps.options import parse
from receptance.data.pool import in_processes
from receptance.evaluation.results import Result
from receptance.model.devices import resolve_device
from receptance.ops.threads import usable_threads
from receptance.progress import say
from receptance.reproduce.experiment import Experiment, Piece, Work
from receptance.reproduce.registry import EXPERIMENTS
from receptance.reproduce.running import Record, measure_here, measure_piece, run
from receptance.sealed import check_outside
from receptance.storage.directories import expanded
from receptance.storage.lock import RunLock

FULL, QUICK = Path("runs/reproduce"), Path("runs/reproduce-quick")
# Processes of an experiment, unless more are asked for.
_MOST = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Redo the experiments of the RWKV paper: data, picture, its claim, and whether we agree.

    `receptance reproduce NAME` runs one of them; its --help shows its options. Each writes
    NAME.json, NAME.png and NAME.svg, of which `receptance report` makes a page. The same command
    continues after Ctrl-C or a crash.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance reproduce --list",
        "receptance reproduce --all --quick",
    )

    list: bool = False
    """Show every experiment: what the paper claims, what is done, what it needs, how long."""
    all: bool = False
    """Run all that need nothing from you, one after another."""
    quick: bool = False
    """Take the quick form of each, of at most two minutes on two processor cores."""
    out: Path | None = None
    """Write into this folder; by default runs/reproduce, or runs/reproduce-quick if quick."""
    gallery: Path | None = None
    """Write the results in --out into this page of Markdown, with their pictures beside it."""

    def __post_init__(self) -> None:
        if self.list + self.all + (self.gallery is not None) != 1:
            raise ValueError("list, all or gallery: take one of them, or name an experiment")


@dataclass(frozen=True, kw_only=True)
class _One:
    """What all experiments have in common on the command line."""

    quick: bool = False
    """Take the quick form, of at most two minutes on two processor cores; other options of the
    experiment replace its own."""
    out: Path | None = None
    """Write into this folder; by default runs/reproduce, or runs/reproduce-quick if quick."""


@dataclass(frozen=True, kw_only=True)
class _Parallel(_One):
    """The same for experiments whose pieces may run side by side."""

    processes: int = 0
    """Work in this number of processes, each with its share of the processor cores; 0 takes one for
    each core or GPU, at most 8."""

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise ValueError(f"processes is {self.processes}; it must be at least 0")


def _command(kind: type[Experiment]) -> type:
    """The options of an experiment with those that all have, as one dataclass."""
    # On the command line the options of the experiment have no prefix.
    hint: Any = Annotated[kind, tyro.conf.arg(name="")]
    base = _Parallel if kind.PARALLEL else _One
    inner = ("experiment", hint, field(default_factory=kind))
    made = make_dataclass(kind.__name__, [inner], bases=(base,), frozen=True, kw_only=True)
    made.__doc__ = f"{kind.__doc__}\n\n{kind.SHOWS} of the paper. {kind.CLAIM}"
    return made


COMMANDS = {name: _command(kind) for name, kind in EXPERIMENTS.items()}


def main(argv: list[str]) -> None:
    """Parse, run what is not done yet, report."""
    console = Console()
    if not argv or argv[0].startswith("-"):
        options = parse(Options, argv or ["--list"], "receptance reproduce")
        if options.list:
            _list(console)
        elif options.gallery is not None:
            write_gallery(_folder(options.out, options.quick), options.gallery)
            say(console, f"wrote {options.gallery}")
        else:
            out = _folder(options.out, options.quick)
            with RunLock(out):
                _all(out, options.quick, console)
        return
    name, *rest = argv
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown experiment {name!r}; there are {', '.join(EXPERIMENTS)}{meant}")
    options = _parsed(name, rest, COMMANDS[name]())
    if options.quick:
        options = _parsed(name, rest, replace(options, experiment=EXPERIMENTS[name].quick()))
    out = _folder(options.out, options.quick)
    with RunLock(out):
        _reported(options.experiment, out, getattr(options, "processes", 0), console)
    say(console, f"a page of it: receptance report {out} --out {out / 'report.html'}")


def _parsed(name: str, argv: Sequence[str], default: Any) -> Any:
    return parse(COMMANDS[name], argv, f"receptance reproduce {name}", default)


def _folder(out: Path | None, quick: bool) -> Path:
    folder = expanded(out or (QUICK if quick else FULL))
    check_outside(folder)
    return folder


def _all(out: Path, quick: bool, console: Console) -> None:
    """Run all experiments that can run by themselves; what one of them refuses is told last."""
    refused = []
    for name, kind in EXPERIMENTS.items():
        if not kind.READY:
            say(console, f"{name} is left out: it needs {kind.NEEDS}")
            continue
        try:
            _reported(kind.quick() if quick else kind(), out, 0, console)
        except ValueError as error:
            refused.append(f"{name}: {error}")
    say(console, f"a page of it: receptance report {out} --out {out / 'report.html'}")
    if refused:
        raise ValueError("; ".join(refused))


def _reported(experiment: Experiment, out: Path, processes: int, console: Console) -> None:
    try:
        result = run(experiment, out, _Work(experiment, processes), console)
    except KeyboardInterrupt:
        say(console, f"stopped; the same command goes on with {out}")
        raise
    _say_result(result, console)
    say(console, f"  {out / experiment.NAME}.json, .png, .svg")


def _say_result(result: Result, console: Console) -> None:
    say(console, f"{result.what}", style="bold")
    for check in result.details["checks"]:
        said = f"{check['verdict']}: {check['claim']} {check['found']}"
        for line in textwrap.wrap(said, 96, initial_indent="  ", subsequent_indent="    "):
            say(console, line)


def _list(console: Console) -> None:
    for name, kind in EXPERIMENTS.items():
        quick, full = kind.TAKES
        about = {"claim": kind.CLAIM, "does": kind.DOES, "needs": kind.NEEDS}
        _say_about(
            f"{name}: {kind.SHOWS}", about | {"takes": f"quick {quick}, full {full}"}, console
        )
    for other in ELSEWHERE:
        about = {"claim": other.claim, "needs": other.needs, "run": other.command}
        _say_about(f"{other.shows}, by another command", about, console)


def _say_about(title: str, about: Mapping[str, str], console: Console) -> None:
    say(console, title, style="bold")
    for head, text in about.items():
        for n, line in enumerate(textwrap.wrap(text, 88)):
            say(console, f"  {'' if n else head:6} {line}")


# ---- pieces of work, here or side by side -------------------------------------------------------


class _Work:
    """Does the pieces of an experiment in this process or in several."""

    def __init__(self, experiment: Experiment, processes: int) -> None:
        self.devices = _devices(getattr(experiment, "device", "cpu"))
        able = len(self.devices) if self.devices[0] != "cpu" else usable_threads()
        self.processes = processes or (min(able, _MOST) if experiment.PARALLEL else 1)

    def __call__(
        self,
        experiment: Experiment,
        folder: Path,
        pieces: Sequence[Piece],
        note: Callable[[str, float], object],
    ) -> Iterable[Record]:
        folder.mkdir(parents=True, exist_ok=True)
        if self.processes == 1:
            return measure_here(experiment, folder, pieces, note, self.devices[0])
        threads = max(1, usable_threads() // self.processes)
        devices = [self.devices[n % len(self.devices)] for n in range(len(pieces))]
        work = functools.partial(_in_worker, experiment, folder, threads)
        placed = list(zip(pieces, devices, strict=True))
        return in_processes(placed, work, min(self.processes, len(pieces)))


def _devices(name: str) -> list[str]:
    """The devices that pieces take in turn."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    return [str(device)]


def _in_worker(
    experiment: Experiment, folder: Path, threads: int, placed: tuple[Piece, str]
) -> Record:
    torch.set_num_threads(threads)
    piece, device = placed
    return measure_piece(experiment, Work(folder, device=device), piece)
