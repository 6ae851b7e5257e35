"""What experiments that train small models have in common: a text, and runs of RWKV-4 on it."""

from __future__ import annotations

import hashlib
import itertools
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from receptance.data import PrepareOptions, TokenFiles, prepare
from receptance.data.ondisk import blocks
from receptance.evaluation.compare.families import Shape
from receptance.evaluation.compare.matching import Counts, counts
from receptance.evaluation.compare.options import parse_size
from receptance.evaluation.compare.runs import Job
from receptance.evaluation.compare.table import family
from receptance.evaluation.compare.training import Diverged, Training
from receptance.evaluation.intervals import mean
from receptance.evaluation.results import Curve, Source
from receptance.model import Model
from receptance.reproduce.experiment import Experiment, Piece, Work
from receptance.tokenizer import Tokenizer, load_tokenizer
from receptance.training.options import TrainOptions

_FAMILY = "rwkv4"
# A curve over steps has at most so many points.
_POINTS, _LEAST_STEPS = 50, 10
STANDARD_LIBRARY = "the modules of Python's standard library"


@dataclass(frozen=True, kw_only=True)
class OnText(Experiment):
    """An experiment that trains models of RWKV-4 on a text."""

    data: tuple[str, ...] = ()
    """Text files, folders, globs, .jsonl, .parquet, hf:NAME:SPLIT. Without any, the modules of
    Python's standard library are read."""
    exclude: tuple[str, ...] = ()
    """Leave out files with a path component like this."""
    tokenizer: str = "bpe:1024"
    """The tokenizer: bytes, bpe:SIZE (trained on the text) or a file."""
    validation: float = 0.05
    """Share of the text that is held out, by whole documents where there are any."""
    held_out: int = 1 << 16
    """Tokens of the text that is held out, at most, on which a finished run is judged."""
    context: int = 128
    """Tokens per sequence."""
    batch: int = 8
    """Sequences per step."""
    device: str = "cpu"
    """Train here: cpu, cuda (runs take all GPUs in turn), cuda:1, auto."""

    def __post_init__(self) -> None:
        for name in ("held_out", "context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def prepare(self, work: Work) -> None:
        """Turn the text into tokens, in the folder of the experiment."""
        self.corpus(work.folder)

    def corpus(self, folder: Path) -> TokenFiles:
        """The tokens, made when they are not there yet."""
        names = self.data or (f"{sysconfig.get_path('stdlib')}/*.py",)
        how = PrepareOptions(validation=self.validation, exclude=self.exclude)
        found = prepare(names, folder / "data", self.tokenizer, how, Console(quiet=True))
        if len(found.train) <= self.context:
            raise ValueError(
                f"{len(found.train):,} tokens to train on, which is not one context of "
                f"{self.context}; give more text with data="
            )
        return found

    def source(self, corpus: TokenFiles) -> Source:
        """The text, as a result names it."""
        digest = hashlib.sha256()
        for tokens in (corpus.train, corpus.validation):
            for block in blocks(tokens):
                digest.update(block.tobytes())
        about = {
            "training tokens": len(corpus.train),
            "held-out tokens": len(corpus.validation),
            "tokenizer": self.tokenizer,
            "the digest is of": "all tokens, those for training first",
        }
        name = ", ".join(Path(name).name for name in self.data) or STANDARD_LIBRARY
        return Source(name=name, digest=digest.hexdigest(), about=about)

    def vocabulary(self) -> int:
        """The size of the vocabulary, known before the text is read."""
        kind, _, size = self.tokenizer.partition(":")
        if kind == "bpe" and size.isdecimal():
            return int(size)
        return load_tokenizer(self.tokenizer).vocab_size

    def job(self, size: str, corpus: TokenFiles, how: TrainOptions, points: int = 1) -> Job:
        """A run of a model of WIDTHxLAYERS that is judged at so many points."""
        vocabulary = tokenizer_of(corpus).vocab_size
        return Job(
            family=_FAMILY,
            shape=shape_of(size, vocabulary),
            train=how,
            corpus=corpus.fingerprint,
            held_out=self.held_out,
            points=points,
            search=True,  # Neither the model nor its loss with a carried state is wanted.
        )

    def constant(self, steps: int, rate: float, seed: int) -> TrainOptions:
        """A schedule without one: the same learning rate at all steps."""
        return TrainOptions(
            steps=steps,
            batch=self.batch,
            context=self.context,
            packing="stream",
            learning_rate=rate,
            final_learning_rate=rate,
            seed=seed,
        )

    def training(self, job: Job, corpus: TokenFiles, work: Work) -> tuple[Training, Model]:
        """A run that has made no step yet, and its model, which may be changed before the first."""
        training = Training(job, corpus, tokenizer_of(corpus), torch.device(work.device))
        assert isinstance(training.model, Model)
        return training, training.model


def tokenizer_of(corpus: TokenFiles) -> Tokenizer:
    """The tokenizer of a corpus that this experiment made."""
    assert corpus.tokenizer is not None
    return corpus.tokenizer


def shape_of(size: str, vocabulary: int) -> Shape:
    """The sizes of a model of WIDTHxLAYERS; ValueError if the text is no such thing."""
    width, layers = parse_size(size)
    usual = family(_FAMILY).usual_ffn_width(width)
    return Shape(vocab_size=vocabulary, width=width, layers=layers, ffn_width=usual)


def counts_of(size: str, vocabulary: int, context: int) -> Counts:
    """Parameters, and FLOPs per token, of a model of WIDTHxLAYERS."""
    return counts(family(_FAMILY), shape_of(size, vocabulary), context)


def check_seeds(seeds: int, steps: int) -> None:
    """ValueError if there are too few of either."""
    if seeds < 2 or steps < _LEAST_STEPS:
        raise ValueError(f"{seeds} seeds, {steps} steps; wanted at least 2 and {_LEAST_STEPS}")


def losses_of(
    training: Training, piece: Piece, work: Work, look: Callable[[], None] = lambda: None
) -> list[float]:
    """Make all steps; the loss before each of them. look is called when there are gradients."""
    total, found = training.job.train.total_steps, []
    for step in range(total):
        work.note(f"{piece['start']}, seed {piece['seed']}, step {step}", step / total)
        try:
            found.append(training.run_step())
        except Diverged:
            raise ValueError(
                f"{piece['start']} diverged at step {step + 1}; give a lower learning_rate"
            ) from None
        look()
    return found


def averaged(runs: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Means over parts of equal length of each run, and the steps in the middle of these parts."""
    steps = len(runs[0])
    points = min(_POINTS, steps)
    edges = [round(n * steps / points) for n in range(points + 1)]
    parts = list(itertools.pairwise(edges))
    means = [[sum(run[a:b]) / (b - a) for a, b in parts] for run in runs]
    return [(a + b + 1) / 2 for a, b in parts], means


def over_seeds(
    name: str, points: tuple[Sequence[float], Sequence[Sequence[float]]], unit: str, model: str
) -> Curve:
    """Places, and values of several runs there, as a curve of their mean with its interval."""
    places, runs = points
    means = [mean(column, "seeds") for column in zip(*runs, strict=True)]
    sure = all(x.low is not None for x in means)
    return Curve(
        name=name,
        x_name="step",
        x=[*places],
        y_name=unit,
        y=[x.value for x in means],
        low=[x.low for x in means if x.low is not None] if sure else None,
        high=[x.high for x in means if x.high is not None] if sure else None,
        interval=means[0].interval,
        model=model,
    )
