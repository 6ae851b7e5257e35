"""The options of `receptance evaluate`, and which of them go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from receptance.atomic import check_replaceable
from receptance.engine import EngineOptions
from receptance.evaluation.benchmarks.prefixes import Prefix
from receptance.evaluation.results import is_result
from receptance.evaluation.texts.enwik8 import Split
from receptance.plots.pictures import check_picture
from receptance.storage.directories import expanded

KINDS = ("text", "enwik8", "lambada", "recall", "tasks", "preset")
"""The options that say what is measured."""
ONLY = {
    "whole": ("text",),
    "positions": ("text",),
    "text_field": ("text",),
    "plot": ("text",),
    "split": ("enwik8",),
    "settings": ("recall",),
    "source": ("recall",),
    "prefix": ("lambada", "recall", "tasks", "preset"),
    "num_fewshot": ("tasks", "preset"),
    "include_path": ("tasks", "preset"),
    "apply_chat_template": ("tasks", "preset"),
    "seed": ("recall", "tasks", "preset"),
    "samples": ("tasks", "preset"),
    "max_length": ("text", "enwik8", "tasks", "preset"),
    "limit": ("text", "lambada", "recall", "tasks", "preset"),
}
"""Options that are for some kinds alone."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say how good models are: bits per byte of texts, loss against position, benchmarks.

    With --out, what was computed is kept as it is found, and the same command goes on after Ctrl-C
    or a crash.
    """

    COMMON: ClassVar[str] = (
        "--text --whole --positions --plot --enwik8 --lambada --prefix --recall --tasks --preset "
        "--num-fewshot --limit --samples --out --tokenizer"
    )
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance evaluate tiny-python --text book.txt",
        "receptance evaluate model.pth --tasks mine.yaml --num-fewshot 5 --out a.json",
    )

    models: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]")
    ] = ()
    """The models, each as for `receptance generate`."""
    text: tuple[str, ...] = ()
    """Measure bits per byte and perplexity of this text: a file, folder or glob of text, .jsonl or
    .parquet, where each text file and each record is a document."""
    whole: bool = False
    """Read all documents as one text, with an end of text between them."""
    text_field: str | None = None
    """The field of a record that holds its text, by default text."""
    positions: int | None = None
    """Measure the loss at each position up to this one, in documents with at least so many tokens;
    of each, so many are read."""
    plot: Path | None = None
    """Draw the loss against the position in this PNG file."""
    enwik8: Path | None = None
    """Measure bits per character of this file of 100 million bytes, beside table 5 of the paper."""
    split: Split | None = None
    """The split of enwik8: train, validation or test (the default)."""
    lambada: Path | None = None
    """Predict last words: a .jsonl file with a field text. With a preset or a task lambada_openai,
    that reads the file."""
    prefix: tuple[Prefix, ...] = ()
    """What stands before every context. By default LAMBADA is measured with each, tasks and recall
    with none, and the paper's with a newline."""
    recall: str | None = None
    """Ask what stood before, in sequences that are drawn on the fly: mqar, induction,
    selective-copying, passkey, parity or s5. Tokens are written as numbers, passkey is text."""
    settings: tuple[str, ...] = ()
    """The difficulty of these sequences, as in pairs=8,length=64; several give a curve."""
    source: Path | None = None
    """The text in which passkey hides its key."""
    tasks: tuple[str, ...] = ()
    """Run this task, group or pattern of lm-evaluation-harness, or the task in this YAML file."""
    preset: Literal["paper"] | None = None
    """Run the paper's twelve tasks, beside what it prints."""
    num_fewshot: int | None = None
    """Put so many examples in front of each question, instead of the task's own number."""
    limit: int | None = None
    """Take the first so many documents of each task or text; with --recall, draw so many sequences
    (100 by default)."""
    include_path: tuple[Path, ...] = ()
    """Look for tasks in the YAML files of this folder as well."""
    apply_chat_template: str | None = None
    """Lay tasks out as a chat by this template: world, raven, instruction, qa or g1."""
    max_length: int | None = None
    """Read windows of at most this number of tokens, as Transformers with a limited context do,
    instead of texts of any length with carried state."""
    samples: int = 0
    """Show this number of documents of each task, with what the model answered."""
    seed: int | None = None
    """Draw examples and texts from this seed, instead of the seeds of the harness."""
    out: Path | None = None
    """Write the result to this JSON file, and keep what is computed beside it meanwhile."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        least = {"limit": 1, "positions": 2, "max_length": 1}
        for name, smallest in {**least, "num_fewshot": 0, "samples": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} is {value}; it must be at least {smallest}")

    @property
    def kind(self) -> str:
        """What is measured, by the name of its option."""
        # A file for LAMBADA may go with tasks, which then read it.
        named = [name for name in KINDS if getattr(self, name)]
        if "lambada" in named and ("tasks" in named or "preset" in named):
            named.remove("lambada")
        if len(named) != 1:
            flags = ", ".join(f"--{name}" for name in KINDS)
            found = " and ".join(f"--{name}" for name in named) or "nothing"
            raise ValueError(f"{found} is to be measured; give one of {flags}")
        return named[0]


def check(options: Options) -> None:
    """Raise errors that would otherwise come only after a model was loaded."""
    if not options.models:
        raise ValueError("MODEL is missing; receptance evaluate --help says more")
    if len(set(names_of(options.models))) < len(options.models):
        raise ValueError("a model is named twice; name each once")
    _check_kind(options)
    if options.plot is not None:
        check_picture(expanded(options.plot))
    if options.out is not None:
        out = expanded(options.out)
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} to write {out.name} into")
        check_replaceable(out, "the result", "a result", is_result)


def _check_kind(options: Options) -> None:
    """ValueError for options that would have no effect on what is measured."""
    for name, kinds in ONLY.items():
        default = Options.__dataclass_fields__[name].default
        if getattr(options, name) != default and options.kind not in kinds:
            flags = " and ".join(f"--{each}" for each in kinds)
            raise ValueError(f"--{name.replace('_', '-')} is for {flags}; leave it out")
    if options.plot is not None and options.positions is None:
        raise ValueError("--plot draws the loss against the position; give --positions too")
    if options.positions is not None and (options.whole or options.max_length is not None):
        raise ValueError(
            "--positions reads each document by itself with carried state; leave out --whole and "
            "--max-length"
        )
    reads_file = options.preset is not None or "lambada_openai" in options.tasks
    if options.lambada is not None and options.kind == "tasks" and not reads_file:
        raise ValueError("no task reads the file of --lambada; add --tasks lambada_openai")
    if options.kind in ("recall", "tasks", "preset") and len(options.prefix) > 1:
        raise ValueError("tasks have one --prefix; repeat the command for another")


def names_of(models: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, or all of it if two are the same."""
    short = [Path(model).name or model for model in models]
    return [
        model if short.count(name) > 1 else name for model, name in zip(models, short, strict=True)
    ]
