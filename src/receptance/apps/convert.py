"""receptance convert: write a model in another format, and compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.apps.text import as_flags
from receptance.apps.waiting import waiting
from receptance.conversion.converting import PASSES, Report, check, convert
from receptance.conversion.source import Note, Source, open_source
from receptance.conversion.target import Dtype, Format, Target
from receptance.progress import progress_bar, say
from receptance.storage.directories import expanded


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model in another format, read that, and compare.

    Nothing is kept unless every tensor and the logits are those of the source.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance convert model.pth model.st --dtype float16",
        "receptance convert runs/mine mine-hf --to hf",
        "receptance convert rwkv7.pth rwkv7.gguf --dtype Q8_0",
    )

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The model: a file of weights, checkpoint directory, training run, Hugging Face directory or
    hub id."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The file or directory to write; it must not exist. The endings .pth, .st, .safetensors,
    .gguf (llama.cpp) and .bin (rwkv.cpp) choose the format."""
    to: Format | None = None
    """Write this format; required for directories (hf, receptance) and for other endings."""
    dtype: Dtype | None = None
    """Write weights of this type; the default keeps the type of each tensor. Q8_0 and Q4_0 are for
    llama.cpp and rwkv.cpp."""
    unscale: bool = False
    """Multiply the weights that transformers divided before it saved them, as config.json says."""
    tokenizer: str | None = None
    """Use this tokenizer file, or "bytes", instead of the tokenizer beside the weights."""
    revision: str | None = None
    """Take this branch, tag or commit of a model on the hub."""
    shard_gb: float = 5.0
    """Split the weights of hf into files of about this many gigabytes."""


def main(argv: list[str]) -> None:
    """Parse, convert, report."""
    options = parse(Options, argv, "receptance convert")
    try:
        _convert(options, Console())
    except ValueError as error:
        raise ValueError(as_flags(str(error), {"format": "--to"})) from error


def _convert(options: Options, console: Console) -> None:
    target = Target(
        path=expanded(options.out),
        format=options.to,
        dtype=options.dtype,
        shard_bytes=options.shard_gb * 1e9,
    )
    source = _source(options, console)
    check(source, target)
    if options.shard_gb != Options.shard_gb and options.to != "hf":
        raise ValueError("--shard-gb is for the format hf; leave it out, or add --to hf")
    with progress_bar(console) as bar:
        total = PASSES * source.config.num_parameters
        task = bar.add_task("converting", total=total, note="")
        note: Note = lambda name, values: bar.update(task, advance=values, note=name)  # noqa: E731
        report = convert(source, target, note)
    _show(console, source, target, report)


def _source(options: Options, console: Console) -> Source:
    with waiting(f"reading {options.model}"):
        source = open_source(options.model, tokenizer=options.tokenizer, revision=options.revision)
    if options.unscale:
        return source.unscaled()
    if source.looks_rescaled():
        say(
            console,
            f"{source.path}: the output matrices halve every {source.rescale_every} blocks, as "
            "when transformers saves a model after evaluating it; if that was so, convert with "
            "--unscale",
            "yellow",
        )
    return source


def _show(console: Console, source: Source, target: Target, report: Report) -> None:
    found = report.difference
    say(
        console,
        f"{target.path}: {report.bytes / 1e6:,.1f} MB, {', '.join(report.dtypes)}; largest "
        f"difference of a logit {found.largest:.1e} ({found.relative:.1e} of the largest logit)",
    )
    if target.format == "st" and report.dtypes != ("float16",):
        say(console, "Ai00 and web-rwkv read float16 only: for those, convert with --dtype float16")
    if report.decays_rounded:
        say(
            console,
            "rwkv.cpp keeps exponentials of decays: some differ in their last bit (float32)",
        )
    if source.tokenizer is None:
        say(console, f"no tokenizer was found beside {source.path}, so none was written")
