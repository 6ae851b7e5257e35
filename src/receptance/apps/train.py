"""receptance train: train a model on text, watch it learn, stop and resume at any time."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from receptance.apps.options import parse
from receptance.data import TokenFiles, is_corpus
from receptance.progress import say
from receptance.storage import checkpoint
from receptance.storage.directories import expanded, newest_checkpoint, put_aside, step_directories
from receptance.storage.lock import RunLock
from receptance.tokenizer import Tokenizer, load_tokenizer
from receptance.training.estimate import DEFAULT_UTILIZATION, estimate, show
from receptance.training.logs import check_kinds
from receptance.training.notes import check_changes, located, read_about
from receptance.training.options import StartOptions
from receptance.training.ranks import joined
from receptance.training.recipes import apply_recipe
from receptance.training.run import Run, RunOptions
from receptance.training.start import NEW_TOKENIZER, adapter_size, begin, check_new, resume

# Those of the paper's models.
_PILE_TOKENIZER, _PILE_VOCABULARY = "20B_tokenizer.json", 50277


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a model on text, records or tokens.

    The run folder gets checkpoints (step-*), metrics.jsonl (samples included) and loss.png.
    Ctrl-C finishes the step, saves and leaves; --resume goes on from there. On several GPUs or
    machines: torchrun --nproc-per-node N -m receptance train ...
    """

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[DATA ...]")] = ()
    """Text files, folders, globs, .jsonl, .parquet, hf:NAME:SPLIT; or one corpus of tokens: a
    folder made by `receptance data prepare`, .npy, .bin/.idx. Not needed with --resume."""
    out: Path = Path("runs/model")
    """The run folder."""
    recipe: str | None = None
    """Options from a recipe (169m, 430m, 1.5b, 3b, 7b, 14b, one-gpu, cpu-10min, context-2048 ...)
    or a TOML file; those given here come first."""
    resume: bool = False
    """Continue the run in --out from its newest whole checkpoint, with its own data, tokenizer,
    sizes and training options; only those may change that do not make it another run."""
    auto_resume: bool = False
    """Continue the run in --out if there is one, otherwise begin it: one command for schedulers
    and torchrun --max-restarts."""
    dry_run: bool = False
    """Print parameters, FLOPs, memory, steps and time, and train nothing."""
    on: str = "this-machine"
    """For --dry-run: the device, such as h200, a100-80g, rtx-4090."""
    devices: int = 1
    """For --dry-run: how many of them."""
    mfu: float = DEFAULT_UTILIZATION
    """For --dry-run: the share of their peak that is reached."""
    start: Annotated[StartOptions, tyro.conf.arg(name="")] = field(default_factory=StartOptions)
    run: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)


def main(argv: list[str]) -> None:
    """Parse, prepare or resume, train, report."""
    options = _parsed(argv, Options())
    if options.recipe is not None:
        options = _parsed(argv, _recipe(options.recipe, options))
    if options.dry_run:
        if options.resume:
            raise ValueError("--dry-run is about a run to be begun; leave out --resume")
        _dry_run(options)
        return
    out = expanded(options.out)
    check_kinds(options.run.log)
    if options.resume and not out.is_dir():
        raise ValueError(f"no run in {out} to resume")
    place = _place(out, options, argv)
    checkpoint.check_device(place.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_line())
        ranks, device = stack.enter_context(joined(place.device, place.context_ranks))
        console = _Console(quiet=not ranks.first)
        if ranks.first:
            stack.enter_context(RunLock(out))
        ranks.wait()
        begun = out.is_dir() and bool(step_directories(out))
        if options.resume or (options.auto_resume and begun):
            directory = Path(ranks.share(lambda: str(_newest(out, console))))
            start = replace(_resumed(argv, directory), device=str(device))
            parts = resume(out, directory, options.data, start, ranks)
            say(console, f"resumed {directory} at step {parts.trainer.step}")
            if options.resume:
                _say_unread(options, console)
        else:
            check_new(out, again=options.auto_resume)
            start = replace(options.start, device=str(device))
            parts = begin(out, options.data, start, ranks, console)
        sizes = parts.trainer.model.config
        console.print(
            f"{sizes.num_parameters:,} parameters ({sizes.num_layers} layers of {sizes.width}, "
            f"vocabulary {sizes.vocab_size}), {len(parts.corpus.train):,} training tokens"
        )
        Run(out, options.run, parts, console).go()


def _recipe(name: str, given: Options) -> Options:
    """The recipe's, but for its tokenizer where the model or the corpus brings one."""
    recipe = apply_recipe(Options(), name)
    if given.start.init is None and _corpus_tokenizer(given.data) is None:
        return recipe
    return replace(recipe, start=replace(recipe.start, tokenizer=None))


def _corpus_tokenizer(data: Sequence[str]) -> Tokenizer | None:
    """Of a corpus of tokens that says what made it."""
    if len(data) == 1 and is_corpus(data[0]):
        return TokenFiles.open(data[0]).tokenizer
    return None


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What nobody but the user can mend, in words."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise ValueError(
                f"out of memory ({text}); take a smaller --micro-batch or --chunk, or --recompute"
            ) from None
        if torch.distributed.is_torchelastic_launched() and re.search(
            "gloo|nccl|connection", text, re.I
        ):
            raise ValueError("another process of this job has gone; see what it said") from None
        raise


def _parsed(argv: list[str], default: Options) -> Options:
    return parse(Options, argv, "receptance train", default)


def _dry_run(options: Options) -> None:
    start = options.start
    if start.init is not None:
        sizes = checkpoint.read_model(start.init, tokenizer=start.named_tokenizer())[0]
        start.check_sizes(sizes)
    else:
        own = _corpus_tokenizer(options.data)
        name = start.tokenizer or NEW_TOKENIZER
        sizes = start.sizes(_vocabulary(name) if own is None else own.vocab_size)
    found = estimate(
        sizes,
        start.train,
        ranks=options.devices,
        context_ranks=start.context_ranks,
        sharded=start.parallel == "fsdp",
        offload=start.offload,
        trained=None if start.tune == "all" else adapter_size(sizes, start),
        device_name=options.on,
        utilization=options.mfu,
    )
    show(Console(), found)


def _vocabulary(name: str) -> int:
    """How many tokens the tokenizer of that name has, or will have."""
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal():
        return int(size)
    if Path(name).name == _PILE_TOKENIZER and not expanded(name).exists():
        return _PILE_VOCABULARY  # of the recipes, whose file need not be here yet
    return load_tokenizer(name).vocab_size


def _say_unread(options: Options, console: Console) -> None:
    """What was given although the run that goes on has its own."""
    text = options.data and not is_corpus(options.data[0])
    for what, given in {"text": text, "recipe": options.recipe}.items():
        if given:
            say(console, f"the {what} given is not read: the run keeps its own")


def _newest(out: Path, console: Console) -> Path:
    directory, skipped = newest_checkpoint(out)
    for reason in skipped:
        say(console, f"skipped a damaged checkpoint: {reason}", style="bold yellow")
    for path in put_aside(directory):
        say(console, f"it is kept as {path}")
    return directory


def _place(out: Path, options: Options, argv: list[str]) -> StartOptions:
    """Where to train is known before anything else: for a run that goes on, where it was."""
    if (options.resume or options.auto_resume) and out.is_dir():
        for directory in step_directories(out)[-1:]:
            with suppress(ValueError):  # damaged, as will be said
                return _resumed(argv, directory)
    return options.start


def _resumed(argv: list[str], directory: Path) -> StartOptions:
    """The stored options; those given that may change replace them, others are refused."""
    # Parsed again: what was stored is now the default, so that only what was given can differ.
    stored = read_about(directory).options
    given = located(_parsed(argv, Options(start=stored)).start)
    check_changes(stored, given)
    return given


class _Console(Console):
    """A console without which the run goes on: its reader may go away, or its disk be full."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            self.on_broken_pipe()  # the rest goes nowhere
            with suppress(OSError):
                print(f"receptance: warning: no more output: {error.strerror}", file=sys.stderr)
