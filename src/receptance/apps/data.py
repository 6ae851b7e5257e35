"""receptance data: make, inspect and merge corpora of tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.data import PrepareOptions, TokenFiles, merge, prepare
from receptance.data.assemble import document_ends
from receptance.data.ondisk import blocks
from receptance.data.tokens import check_ids
from receptance.progress import counted, say
from receptance.storage.directories import expanded
from receptance.tokenizer import load_tokenizer

# The lengths of documents are counted in this many tokens from the beginning of a corpus.
_COUNTED_TOKENS = 1 << 28
_SHOWN_TOKENS = 200
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Tokenize text, JSON lines, parquet and data sets into a corpus folder for training.

    The same command continues after Ctrl-C or a crash, which lose at most some seconds of work.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """The sources: text files, .jsonl (both also with .gz), .parquet, folders and globs of these,
    and hf:NAME[:CONFIG][:SPLIT] for data sets of the hub."""
    out: Path
    """Write this corpus folder."""
    tokenizer: str
    """Encode with this tokenizer: bytes, bpe:SIZE (trained on the text), or a tokenizer file."""
    options: Annotated[PrepareOptions, tyro.conf.arg(name="")] = field(
        default_factory=PrepareOptions
    )


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what is in a corpus: counts, the first document, how long documents are."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """The corpus: a corpus folder, a .npy file, or a .bin/.idx pair."""
    tokenizer: str | None = None
    """Decode with this tokenizer (bytes, or a file) if the corpus has none."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Make one corpus folder of token files: .npy, .bin/.idx pairs, corpora, folders of these."""

    shards: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SHARD ...")]
    """The token files, in the order in which they are merged; those of a folder go by name."""
    out: Path
    """Write this corpus folder."""
    tokenizer: str
    """The tokenizer that made the tokens: bytes, or a file."""
    validation: float = 0.01
    """Keep this share of the tokens for validation; corpora among the shards keep their own."""
    format: Literal["npy", "binidx"] = "npy"
    """Write npy, or binidx for RWKV-LM and Megatron."""
    seed: int = 0
    """Choose the documents for validation from this seed."""


Command = Prepare | Inspect | Merge
COMMANDS: dict[str, type[Command]] = {"prepare": Prepare, "inspect": Inspect, "merge": Merge}


def main(argv: list[str]) -> None:
    """Parse, run the subcommand, report."""
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return
    if not argv or argv[0] not in COMMANDS:
        found = f"unknown command {argv[0]!r}" if argv else "no command"
        raise ValueError(f"{found}; there are {', '.join(COMMANDS)}")
    command: Command = parse(COMMANDS[argv[0]], argv[1:], f"receptance data {argv[0]}")
    console = Console()
    if isinstance(command, Inspect):
        _inspect(command, console)
        return
    corpus = _prepared(command, console) if isinstance(command, Prepare) else _merged(command)
    counts = f"{len(corpus.train):,} training and {len(corpus.validation):,} validation tokens"
    say(console, f"{command.out}: {counts}")


def _usage() -> str:
    """The help text: each command with the beginning of its docstring."""
    purposes = {name: re.split(r"[.:]\s", kind.__doc__ or "")[0] for name, kind in COMMANDS.items()}
    return "\n".join(
        [
            "usage: receptance data COMMAND [OPTIONS]",
            "(receptance data COMMAND --help lists them)",
            "",
            *(f"  {name:10} {purpose}" for name, purpose in purposes.items()),
        ]
    )


def _prepared(command: Prepare, console: Console) -> TokenFiles:
    if not command.sources:
        raise ValueError("no sources; name a text file, a folder, a glob or a data set")
    return prepare(command.sources, command.out, command.tokenizer, command.options, console)


def _merged(command: Merge) -> TokenFiles:
    if not command.shards:
        raise ValueError("no shards; name token files, or folders of them")
    return merge(
        [expanded(shard) for shard in command.shards],
        expanded(command.out),
        load_tokenizer(command.tokenizer),
        validation=command.validation,
        seed=command.seed,
        layout=command.format,
    )


def _inspect(command: Inspect, console: Console) -> None:
    corpus = TokenFiles.open(command.path)
    tokenizer = load_tokenizer(command.tokenizer) if command.tokenizer else corpus.tokenizer
    about = "unknown" if tokenizer is None else f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"
    say(console, f"tokenizer    {about}; end of text {corpus.end_of_text}")
    say(console, f"numbers      {corpus.train.dtype}, fingerprint {corpus.fingerprint[:16]}")
    for name in ("train", "validation"):
        _describe(name, getattr(corpus, name), getattr(corpus, f"{name}_mask"), corpus, console)
    if not len(corpus.train):
        return
    if tokenizer is not None:
        for tokens in (corpus.train, corpus.validation):
            check_ids(tokens, tokenizer.vocab_size)
    end = int(document_ends(corpus.train[:_COUNTED_TOKENS], corpus.end_of_text)[0])
    first = corpus.train[: min(end, _SHOWN_TOKENS)].tolist()
    text = repr(tokenizer.decode(first)) if tokenizer else " ".join(map(str, first))
    say(console, f"begins with  {text}")


def _describe(
    name: str, tokens: np.ndarray, mask: np.ndarray | None, corpus: TokenFiles, console: Console
) -> None:
    """Print the number of tokens and documents, and a line on the lengths of the documents."""
    documents = sum(np.count_nonzero(block == corpus.end_of_text) for block in blocks(tokens))
    line = f"{name:11}  {len(tokens):,} tokens in {counted(int(documents), 'document')}"
    if mask is not None:
        learned = sum(int(np.count_nonzero(block)) for block in blocks(mask))
        line += f", {learned:,} of them to be learned"
    say(console, line)
    ends = document_ends(tokens[:_COUNTED_TOKENS], corpus.end_of_text)
    if len(ends):
        say(console, f"             {length_histogram(np.diff(ends, prepend=0))}")


def length_histogram(lengths: np.ndarray) -> str:
    """A histogram in one line: a bar for documents of 1, 2-3, 4-7, ... tokens.

    It stands between the lengths of the shortest and the longest document.
    """
    counts = np.bincount(np.log2(lengths).astype(int))
    first = int(np.flatnonzero(counts)[0])
    bars = "".join(
        _BARS[-(-int(n) * (len(_BARS) - 1) // int(counts.max()))] for n in counts[first:]
    )
    median = int(np.median(lengths))
    return f"{lengths.min():,} {bars} {lengths.max():,} tokens per document, median {median:,}"
