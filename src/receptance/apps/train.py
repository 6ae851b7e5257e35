"""receptance train: train a model on text, watch it learn, stop and resume at any time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from receptance import checkpoint
from receptance.config import ModelConfig, published
from receptance.data import Batches, TokenFiles, find_files, read_documents, split, tokenize
from receptance.model import Model
from receptance.run import Run, RunOptions, progress_bar, say
from receptance.tokenizer import BPETokenizer, Tokenizer, load_tokenizer
from receptance.training import Trainer, TrainOptions, stored_options

# Options that a resumed run may change; the rest would make it another run.
_MAY_CHANGE = ("steps", "minutes")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a model on text files, folders or globs.

    The run folder gets checkpoints (step-*), metrics.jsonl (samples included) and loss.png.
    Ctrl-C finishes the step, saves and leaves; --resume goes on from there.
    """

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT ...]")] = ()
    """Files, folders (all text files below) or globs. Not needed with --resume."""
    out: Path = Path("runs/model")
    """The run folder."""
    resume: bool = False
    """Continue the run in --out from its newest whole checkpoint, with its own data, tokenizer,
    sizes and training options; of these only --steps and --minutes may change."""
    exclude: tuple[str, ...] = ()
    """Leave out files with a path component like this, e.g. site-packages."""
    tokenizer: str = "bpe:2048"
    """bytes, bpe:SIZE (trained on the text), or a tokenizer file."""
    size: str | None = None
    """A published size (169m, 430m, 1.5b, 3b, 7b, 14b) instead of --width and --layers."""
    width: int = 256
    """Channels, C."""
    layers: int = 6
    """Blocks, L."""
    validation: float = 0.02
    """Share of the text that is kept for validation."""
    device: str = "cpu"
    """Where to train: cpu, cuda, ..."""
    run: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    train: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(default_factory=TrainOptions)


def main(argv: list[str]) -> None:
    """Parse, prepare or resume, train, report."""
    options = tyro.cli(Options, args=argv, prog="receptance train")
    console = _Console()
    out = options.out.expanduser()
    if options.resume:
        trainer, tokenizer, corpus = _resume(out, options, argv, console)
    else:
        trainer, tokenizer, corpus = _begin(out, options, console)
    sizes = trainer.model.config
    console.print(
        f"{sizes.num_parameters:,} parameters ({sizes.num_layers} layers of {sizes.width}, "
        f"vocabulary {sizes.vocab_size}), {len(corpus.train):,} training tokens"
    )
    Run(out, options.run, trainer, tokenizer, corpus, console).go()


def _begin(out: Path, options: Options, console: Console) -> tuple[Trainer, Tokenizer, TokenFiles]:
    """Read and tokenize the text, make a new model."""
    if not options.data:
        raise ValueError("no data; name a text file, a folder or a glob, or use --resume")
    checkpoint.check_device(options.device)
    if out.is_dir() and checkpoint.step_directories(out):
        raise ValueError(f"{out} already holds a run; add --resume, or choose another --out")
    if (out / "metrics.jsonl").exists():
        raise ValueError(
            f"{out} holds a run without a checkpoint; delete it or choose another --out"
        )
    files = find_files(options.data, options.exclude)
    documents = read_documents(files)
    training, held_out = split(documents, options.validation, options.train.seed)
    (out / "data").mkdir(parents=True, exist_ok=True)  # now, lest hours of work end in a refusal
    console.print(f"{sum(map(len, documents)) / 1e6:.2f} MB of text, files: {len(files):,}")
    tokenizer = _tokenizer(options.tokenizer, training, console)
    sizes = _sizes(options, tokenizer)
    with progress_bar(console) as bar:
        task = bar.add_task("tokenizing", total=sum(map(len, documents)), note="")
        advance: Callable[[int], None] = lambda done: bar.advance(task, done)  # noqa: E731
        tokens, checked = (tokenize(part, tokenizer, advance) for part in (training, held_out))
    batches = _batches(tokens, options.train)
    corpus = TokenFiles.write(out / "data", tokens, checked, b"".join(held_out), tokenizer)
    model = Model(
        sizes,
        seed=options.train.seed,
        dropout=options.train.dropout,
        embedding_bound=options.train.learning_rate,
    ).to(options.device)
    return Trainer(model, batches, options.train), tokenizer, corpus


def _resume(
    out: Path, options: Options, argv: list[str], console: Console
) -> tuple[Trainer, Tokenizer, TokenFiles]:
    """Everything as the newest whole checkpoint of the run has it."""
    if not out.is_dir():
        raise ValueError(f"no run in {out} to resume")
    directory, skipped = checkpoint.newest_checkpoint(out)
    for reason in skipped:
        say(console, f"skipped a damaged checkpoint: {reason}", style="bold yellow")
    model, tokenizer = checkpoint.load(directory, device=options.device)
    train = _resumed_options(argv, options, stored_options(directory), model.config)
    model.dropout = train.dropout
    corpus = TokenFiles.open(out / "data")
    trainer = Trainer(model, _batches(corpus.train, train), train)
    trainer.restore(directory)
    say(console, f"resumed {directory} at step {trainer.step}")
    return trainer, tokenizer, corpus


def _resumed_options(
    argv: list[str], options: Options, stored: TrainOptions, sizes: ModelConfig
) -> TrainOptions:
    """The stored options; those given that may change replace them, others are refused."""
    # Parsed again: what was stored is now the default, so that only what was given can differ.
    default = replace(options, width=sizes.width, layers=sizes.num_layers, train=stored)
    given = tyro.cli(Options, args=argv, default=default)
    if given.size is not None:
        shape = published(given.size)
        given = replace(given, width=shape.width, layers=shape.num_layers)
    before, now = (
        {"width": o.width, "layers": o.layers, **asdict(o.train)} for o in (default, given)
    )
    for name, old in before.items():
        if now[name] != old and name not in _MAY_CHANGE:
            raise ValueError(
                f"the run was started with {name} {old}, not {now[name]}; a resumed run keeps its "
                "options, so leave this one out or start another run"
            )
    return given.train


def _batches(tokens: np.ndarray, options: TrainOptions) -> Batches:
    return Batches(tokens, context=options.context, batch=options.batch, seed=options.seed)


def _tokenizer(name: str, documents: list[bytes], console: Console) -> Tokenizer:
    kind, _, size = name.partition(":")
    if kind != "bpe":
        return load_tokenizer(name)
    if not size.isdecimal():
        raise ValueError(f"tokenizer {name!r}: say how many tokens, for example bpe:2048")
    with console.status(f"training a BPE of {size} tokens"):
        return BPETokenizer.train((d.decode("utf-8", "replace") for d in documents), int(size))


def _sizes(options: Options, tokenizer: Tokenizer) -> ModelConfig:
    if options.size is not None:
        sizes = replace(published(options.size), vocab_size=tokenizer.vocab_size)
    else:
        sizes = ModelConfig(
            vocab_size=tokenizer.vocab_size, width=options.width, num_layers=options.layers
        )
    return sizes


class _Console(Console):
    """A console without which the run goes on, when the reader of its output has gone away."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()
