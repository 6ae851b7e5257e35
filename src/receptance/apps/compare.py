"""receptance compare: train RWKV and Transformers of the same size alike, and compare them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro
from rich.table import Table

from receptance.apps import compare_tasks
from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.atomic import written
from receptance.data import (
    PrepareOptions,
    ReadOptions,
    TokenFiles,
    check_sources,
    is_corpus,
    prepare,
)
from receptance.data.pool import in_processes
from receptance.errors import one_line
from receptance.evaluation.compare.comparing import Entry, Plan, compare, make_plan
from receptance.evaluation.compare.costs import Costs, Measurement, measure, step_seconds
from receptance.evaluation.compare.estimating import estimate
from receptance.evaluation.compare.findings import LOSS, make_result
from receptance.evaluation.compare.options import CompareOptions
from receptance.evaluation.compare.runs import Job, Record
from receptance.evaluation.compare.training import Stopped, run_job
from receptance.evaluation.drawing import charts, file_names
from receptance.evaluation.results import Result
from receptance.model.devices import resolve_device
from receptance.ops.threads import usable_threads
from receptance.progress import progress_bar, say
from receptance.sealed import check_outside
from receptance.storage.directories import expanded
from receptance.storage.lock import RunLock
from receptance.tokenizer import Tokenizer, load_tokenizer
from receptance.training.recipes import apply_recipe
from receptance.training.stopping import stop_requested

RESULT = "result.json"
_PICTURES = "pictures"


@dataclass(frozen=True, kw_only=True)
class _Compare(CompareOptions):
    """The options of a comparison, as the command line shows them."""

    # On the command line these options have no prefix.
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = field(default_factory=ReadOptions)


# What --quick takes unless other options say otherwise.
QUICK = _Compare(
    sizes=("64x3",),
    seeds=(2,),
    tokenizer="bpe:1024",
    tokens=(400_000,),
    context=128,
    learning_rates=(2e-3, 4e-3, 8e-3),
    validation=0.05,
    held_out=1 << 14,
    points=10,
    sweep_share=0.25,
    contexts=(256, 1024, 4096),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train RWKV and Transformers of the same size alike, on any text, and compare them.

    The folder gets a file for each run, the models, result.json and pictures; `receptance report`
    makes a page of it. The same command continues after Ctrl-C or a crash. With --task they are
    compared on recall, state tracking, images or series: receptance compare --task mqar --help.
    """

    COMMON: ClassVar[str] = (
        "--out --quick --plan --dry-run --processes --models --sizes --seeds --tokens --tokenizer "
        "--context --match --learning-rates"
    )
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance compare my-texts/ --quick --out runs/quick",
        "receptance compare my-texts/ --sizes 96x4 --sizes 160x5 --dry-run",
        "receptance compare my-texts/ --plan my-plan.toml --out runs/mine --processes 2",
    )

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[DATA ...]")] = ()
    """Text files, folders, globs, .jsonl, .parquet, hf:NAME:SPLIT; or one corpus of tokens, made by
    `receptance data prepare`."""
    out: Path = Path("runs/compare")
    """The folder of the comparison."""
    quick: bool = False
    """Compare small models on little text, in some minutes on two processors."""
    plan: str | None = None
    """Take options from this TOML file; options given on the command line replace them."""
    dry_run: bool = False
    """Show the models with their sizes and say how long it takes, and stop."""
    processes: int = 1
    """Train this number of models side by side, each with its share of the processors."""
    device: str = "auto"
    """Train here: cpu, cuda (runs take all GPUs in turn), cuda:1; auto takes GPUs where there are
    any."""
    compare: Annotated[_Compare, tyro.conf.arg(name="")] = field(default_factory=_Compare)

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}; it must be at least 1")
        if self.quick and self.plan is not None:
            raise ValueError("quick is a plan of its own; leave it out, or the plan")


def main(argv: list[str]) -> None:
    """Parse, prepare the text, run what is not done yet, report."""
    if compare_tasks.names_task(argv):
        compare_tasks.main(argv)
        return
    options = _parsed(argv, Options())
    if options.quick:
        options = _parsed(argv, replace(options, compare=QUICK))
    if options.plan is not None:
        options = _parsed(argv, apply_recipe(Options(), options.plan))
    console = Console()
    if options.dry_run:
        _dry_run(options, console)
        return
    if not options.data:
        raise ValueError("no data; name a text file, a folder, a glob or a corpus")
    out = expanded(options.out)
    check_outside(out)
    vocabulary = _vocabulary(options)
    if vocabulary is not None:
        make_plan(options.compare, vocabulary)  # refuses now what would be refused later
    with RunLock(out):
        try:
            _compare(options, out, console)
        except (KeyboardInterrupt, Stopped):
            say(console, f"stopped; the same command goes on with {out}")
            raise KeyboardInterrupt from None


def _parsed(argv: list[str], default: Options) -> Options:
    return parse(Options, argv, "receptance compare", default)


def _compare(options: Options, out: Path, console: Console) -> None:
    corpus = _corpus(options, out, console)
    tokenizer = corpus.tokenizer
    if tokenizer is None:
        raise ValueError(f"{corpus.path} does not say which tokenizer made it")
    plan = make_plan(options.compare, tokenizer.vocab_size)
    console.print(_sizes_table(plan))
    runs = _Runs(options, out, corpus, tokenizer)
    measured = functools.partial(_measured, runs.devices[0])
    found = compare(plan, corpus, out, runs, measured, console)
    result = make_result(plan, corpus, options.data, found, options.processes)
    with one_line(out, "the result to "):
        result.save(out / RESULT)
        _draw(result, out / _PICTURES)
    console.print(_losses_table(result))
    for note in result.notes:
        say(console, f"- {note}")
    say(console, f"result: {out / RESULT}, pictures: {out / _PICTURES}")
    say(console, f"a page of it: receptance report {out} --out {out / 'report.html'}")


def _corpus(options: Options, out: Path, console: Console) -> TokenFiles:
    """The corpus that data names, or one made in the folder of the text that data names."""
    how = options.compare
    if len(options.data) == 1 and is_corpus(options.data[0]):
        return TokenFiles.open(options.data[0], validation=how.validation)
    about = PrepareOptions(
        **asdict(how.read), validation=how.validation, exclude=how.exclude, seed=0
    )
    return prepare(options.data, out / "data", how.tokenizer, about, console)


def _vocabulary(options: Options) -> int | None:
    """The size of the vocabulary, if that is known before the text is read."""
    if len(options.data) == 1 and is_corpus(options.data[0]):
        tokenizer = TokenFiles.open(options.data[0]).tokenizer
        return None if tokenizer is None else tokenizer.vocab_size
    kind, _, size = options.compare.tokenizer.partition(":")
    if kind == "bpe" and size.isdecimal():
        return int(size)
    return load_tokenizer(options.compare.tokenizer).vocab_size


def _draw(result: Result, folder: Path) -> None:
    """Write each chart of the result as an SVG of its own."""
    folder.mkdir(exist_ok=True)
    found = charts(result)
    for name, chart in zip(file_names(found), found, strict=True):
        with written(folder / name) as file:
            file.write(chart.svg(alone=True).encode())


# ---- runs, here or side by side -----------------------------------------------------------------


class _Runs:
    """Runs jobs in this process or in several."""

    def __init__(
        self, options: Options, out: Path, corpus: TokenFiles, tokenizer: Tokenizer
    ) -> None:
        self.out, self.corpus, self.tokenizer = out, corpus, tokenizer
        self.processes = options.processes
        self.validation = options.compare.validation
        self.devices = _devices(options.device)

    def __call__(self, jobs: Sequence[Job]) -> Iterable[Record]:
        placed = [(job, self.devices[n % len(self.devices)]) for n, job in enumerate(jobs)]
        if self.processes == 1:
            return self._here(placed)
        threads = max(1, usable_threads() // self.processes)
        work = functools.partial(_work, self.out, self.corpus.path, self.validation, threads)
        return in_processes(placed, work, min(self.processes, len(jobs)))

    def _here(self, placed: Sequence[tuple[Job, str]]) -> Iterator[Record]:
        with stop_requested() as stop:
            for job, device in placed:
                yield run_job(
                    job, self.corpus, self.tokenizer, self.out, device=device, stop=stop.is_set
                )
            if stop.is_set():  # It came in the last of these runs, and more would follow.
                raise Stopped


def _devices(name: str) -> list[str]:
    """The devices that runs take in turn."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    return [str(device)]


def _work(
    out: Path, corpus: Path, validation: float, threads: int, placed: tuple[Job, str]
) -> Record:
    """Run a job in a worker, which saves the run when it is told to end or its parent is gone."""
    job, device = placed
    stop = _told_to_end()
    if stop.is_set():
        raise Stopped
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    torch.set_num_threads(threads)
    tokens = TokenFiles.open(corpus, validation=validation)
    assert tokens.tokenizer is not None
    try:
        return run_job(job, tokens, tokens.tokenizer, out, device=device, stop=stop.is_set)
    except Stopped:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # Nobody is left to hand the next job out, or to end this process.
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@functools.cache
def _told_to_end() -> threading.Event:
    """Set when this worker is told to end; jobs that reach it after that are not begun."""
    return threading.Event()


def _measured(device: str, work: Measurement) -> Costs:
    """Measure a model in a process of its own, so that its memory is its own."""
    work = replace(work, device=device)
    return next(iter(in_processes([work], functools.partial(_measure, usable_threads()), 1)))


def _measure(threads: int, work: Measurement) -> Costs:
    torch.set_num_threads(threads)
    return measure(work)


# ---- what is shown ------------------------------------------------------------------------------


def _dry_run(options: Options, console: Console) -> None:
    """Show sizes, and the time that the known runs take by a few steps of each model."""
    if options.data and not is_corpus(options.data[0]):
        check_sources(options.data, options.compare.read, options.compare.exclude)
    vocabulary = _vocabulary(options)
    if vocabulary is None:
        raise ValueError(f"{options.data[0]} does not say which tokenizer made it")
    plan = make_plan(options.compare, vocabulary)
    console.print(_sizes_table(plan))
    torch.set_num_threads(max(1, usable_threads() // options.processes))
    table = Table("model", "tokens/s", "runs", "hours", box=None, pad_edge=False)
    positions, total = options.compare.batch * options.compare.context, 0.0
    with progress_bar(console) as bar:
        task = bar.add_task("measuring", total=len(plan.entries), note="")
        for entry in plan.entries:
            bar.update(task, note=entry.name)
            step = step_seconds(plan.measurement(entry, options.out))
            hours = estimate(plan, entry, step) / 3600
            total += hours
            runs = sum(count for each, _, count in plan.runs() if each is entry)
            table.add_row(entry.name, f"{positions / step:,.0f}", str(runs), f"{hours:.2f}")
            bar.update(task, advance=1)
    console.print(table)
    say(
        console,
        f"all runs: about {total / options.processes:.2g} hours in {options.processes} processes "
        "on this machine's CPU; learning rates beyond those named, and costs, come on top",
    )


def _sizes_table(plan: Plan) -> Table:
    """The models with what they have and cost."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for name in ("feed-forward", "parameters", "non-embedding", "training FLOPs/token"):
        table.add_column(name, justify="right")
    for entry in plan.entries:
        table.add_row(entry.name, *(f"{n:,}" for n in _size_figures(entry)))
    return table


def _size_figures(entry: Entry) -> tuple[int, ...]:
    found = entry.counts
    return entry.shape.ffn_width, found.parameters, found.non_embedding, found.training_flops


def _losses_table(result: Result) -> Table:
    """The losses of all models with their intervals."""
    table = Table("model", LOSS, "", box=None, pad_edge=False)
    for figure in result.figures:
        if figure.name.startswith(LOSS) and figure.low is not None:
            extra = figure.name.removeprefix(LOSS).lstrip(", ")
            about = f"{figure.low:.4f} to {figure.high:.4f} ({figure.interval})"
            name = f"{figure.model}{f', {extra}' if extra else ''}"
            table.add_row(name, f"{figure.value:.4f}", about)
    return table
