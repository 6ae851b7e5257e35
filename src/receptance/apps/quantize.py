"""receptance quantize: write a model with its matrices as int8 or int4."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro
from rich.table import Table
from torch import Tensor

from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.apps.waiting import waiting
from receptance.config import ModelConfig
from receptance.model import Model
from receptance.model.rwkv import fingerprint
from receptance.progress import progress_bar, say
from receptance.quantize import Quantized, QuantizedKind, check_group, relative_error
from receptance.quantize.calibration import LEAST_TOKENS, Calibration
from receptance.quantize.weights import quantize_tensors
from receptance.storage.checkpoint import read_model
from receptance.storage.directories import existing, expanded
from receptance.storage.pairing import no_tokenizer
from receptance.storage.quantized import About, is_quantized, write_quantized
from receptance.tokenizer import Tokenizer

# The number of tokens to read of a calibration text if none is named.
_USUAL_TOKENS = 8192
# The calibration text is read in this many pieces, from all over the file.
_PIECES = 8
# A token has fewer bytes than this on average, in any language and vocabulary.
_BYTES_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model with its matrices as small integers.

    All other tensors are float32. The directory that is written loads at once.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "receptance quantize runs/mine --to int4 --calibrate text.txt --out mine-int4",
    )

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model: a checkpoint directory, training run, .pth file, Hugging Face directory or hub
    id."""
    to: QuantizedKind
    """Write int8 (8.1 bits per weight) or int4 (4.5 bits per weight)."""
    out: Path
    """Write this directory; it must not exist."""
    group: int | None = None
    """Let this many weights share a scale and a minimum in int4: 32, 64 (the default) or 128."""
    calibrate: Path | None = None
    """Fit the rounding of int4 to this text, which should resemble what the model will read."""
    calibration_tokens: int | None = None
    """Read this number of tokens of that text, by default 8192."""
    tokenizer: str | None = None
    """Use this tokenizer file, or "bytes", instead of the tokenizer beside the weights."""


def main(argv: list[str]) -> None:
    """Parse, quantize and write tensor by tensor, report."""
    options = parse(Options, argv, "receptance quantize")
    out = expanded(options.out)
    _check(options, out)
    with waiting(f"reading {options.model}"):
        config, tensors, tokenizer = read_model(options.model, tokenizer=options.tokenizer)
    if options.calibrate is not None and tokenizer is None:
        raise no_tokenizer(config, options.model)
    calibration = _calibration(options, config, tensors, tokenizer)
    about = About(
        kind=options.to,
        group=check_group(options.to, options.group),
        calibration_tokens=calibration.tokens.numel() if calibration else 0,
        source=fingerprint(config, tensors),
    )
    console, report = Console(), Report()
    weights = quantize_tensors(
        tensors, options.to, options.group, calibration, config.architecture.layouts(config)
    )
    watched = _watched(console, tensors, weights, report)
    write_quantized(out, config, tokenizer, about, watched)
    report.show(console, out)


def _check(options: Options, out: Path) -> None:
    """ValueError if the options are wrong; this is checked before anything is loaded."""
    check_group(options.to, options.group)
    if options.calibrate and options.to == "int8":
        raise ValueError("int8 is exact enough without a text; leave out --calibrate")
    if options.calibration_tokens is not None and options.calibrate is None:
        raise ValueError("--calibration-tokens is about a text; name one with --calibrate")
    if options.calibration_tokens is not None and options.calibration_tokens < LEAST_TOKENS:
        raise ValueError(
            f"calibration_tokens is {options.calibration_tokens}; at least {LEAST_TOKENS} are "
            "wanted, and some thousands are good"
        )
    if out.exists():
        raise ValueError(f"{out} exists; give another name with --out")
    if is_quantized(existing(options.model)):
        raise ValueError(
            f"{options.model} is quantized already; start from the model that it was made from"
        )


def _calibration(
    options: Options,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
) -> Calibration | None:
    if options.calibrate is None or tokenizer is None:
        return None
    rows = sample_text(options.calibrate, tokenizer, options.calibration_tokens or _USUAL_TOKENS)
    return Calibration(Model.from_tensors(config, tensors), rows)


def sample_text(path: Path, tokenizer: Tokenizer, count: int) -> Tensor:
    """About `count` tokens of a text file, in pieces from all over it: [8,T] int64.

    A short text gives fewer.
    """
    size, each = path.stat().st_size, count // _PIECES
    pieces = []
    with path.open("rb") as file:
        for number in range(_PIECES):
            start, stop = (size * n // _PIECES for n in (number, number + 1))
            file.seek(start)
            text = file.read(min(stop - start, each * _BYTES_PER_TOKEN))
            # A piece may begin and end inside a character.
            pieces.append(tokenizer.encode(text.decode("utf-8", errors="ignore"))[:each])
    shortest = min(map(len, pieces))
    return torch.tensor([piece[:shortest] for piece in pieces], dtype=torch.int64)


def _watched(
    console: Console,
    tensors: Mapping[str, Tensor],
    weights: Iterator[tuple[str, Quantized | Tensor]],
    report: Report,
) -> Iterator[tuple[str, Quantized | Tensor]]:
    """Pass the weights on, with a progress bar, and note each in the report."""
    with progress_bar(console) as bar:
        total = sum(x.numel() for x in tensors.values())
        task = bar.add_task("quantizing", total=total, note="")
        for name, weight in weights:
            report.add(name, tensors[name], weight)
            yield name, weight
            bar.update(task, advance=tensors[name].numel(), note=name)


@dataclass
class Report:
    """The sizes of a model before and after, and the errors of its matrices."""

    before: int = 0
    """The size of all tensors of the original model, in bytes."""
    errors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """The relative errors of the matrices, by kind of matrix."""
    parameters: int = 0

    def add(self, name: str, exact: Tensor, weight: Quantized | Tensor) -> None:
        """Take note of one tensor."""
        self.before += exact.nbytes
        self.parameters += exact.numel()
        if isinstance(weight, Quantized):
            kind = re.sub(r"^blocks\.\d+\.|\.weight$", "", name)
            self.errors[kind].append(relative_error(exact.cpu(), weight))

    def show(self, console: Console, out: Path) -> None:
        """Print sizes, and the largest errors by kind of matrix."""
        after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        table = Table("matrices", "number", "worst relative error")
        for kind, errors in self.errors.items():
            table.add_row(kind, str(len(errors)), f"{max(errors):.2%}")
        console.print(table)
        say(
            console,
            f"{out}: {after / 1e6:,.1f} MB, {8 * after / self.parameters:.2f} bits per weight; "
            f"before {self.before / 1e6:,.1f} MB, {8 * self.before / self.parameters:.2f}",
        )
