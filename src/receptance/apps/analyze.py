"""receptance analyze: one HTML page that shows what a model does with a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro

from receptance.analysis import Trace, causal_trace
from receptance.analysis.page import (
    MOST_TOKENS,
    Analysis,
    analyze,
    check_length,
    check_page,
    token_text,
)
from receptance.analysis.tracing import EVERYTHING, places, subject_positions
from receptance.apps.console import Console, say_device
from receptance.apps.options import parse
from receptance.apps.waiting import waiting
from receptance.evaluation.results import check_result
from receptance.model import Model
from receptance.plots.pictures import check_picture
from receptance.progress import progress_bar, say
from receptance.storage.checkpoint import load
from receptance.storage.pairing import no_tokenizer
from receptance.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show what a model does with a text: one HTML page, which loads nothing from anywhere.

    The page has the loss of each token and what it reads from, layer by layer and for the whole
    model, the predictions after each layer, and how fast the channels forget. With a subject and an
    answer it also shows where that answer passes through.
    """

    COMMON: ClassVar[str] = "--out --effects --subject --answer --plot --json --tokenizer --device"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        'receptance analyze tiny-python "for i in range(10):" --out page.html',
        'receptance analyze m "Rome is in" --subject Rome --answer " Italy" --out p',
    )

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model, as for `receptance generate`."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """The text to look at, as one argument."""
    out: Path
    """Write the page to this file."""
    effects: bool = True
    """Hide each token in turn, which shows what the whole model reads from and takes longest."""
    max_tokens: int = MOST_TOKENS
    """Refuse texts of more tokens than this."""
    subject: str | None = None
    """Trace the answer: put noise on this part of the text, and see what brings it back."""
    answer: str | None = None
    """The text that should follow; its first token is traced."""
    noise: float = 3.0
    """Deviation of that noise, as a multiple of that of the embeddings."""
    samples: int = 10
    """Number of samples of noise."""
    seed: int = 0
    """Draw the noise from this seed."""
    plot: Path | None = None
    """Draw the trace of whole layers, as in figure 11 of the paper, in this PNG file."""
    json: Path | None = None
    """Write the figures of the page and of the trace to this file as well."""
    tokenizer: str | None = None
    """A tokenizer file, or "bytes", instead of the one beside the weights."""
    device: str = "auto"
    """The device to run on: cpu, cuda, ...; auto takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and of all that is computed."""


def main(argv: list[str]) -> None:
    """Parse, look, write the page."""
    options = parse(Options, argv, "receptance analyze")
    _check(options)
    with waiting(f"loading {options.model}"):
        model, tokenizer = load(
            options.model,
            tokenizer=options.tokenizer,
            device=options.device,
            dtype=_DTYPES[options.dtype],
        )
    if tokenizer is None:
        raise no_tokenizer(model.config, options.model)
    say_device(model.device)
    ids = tokenizer.encode(options.text)
    check_length(len(ids), options.max_tokens)
    traced = None if options.subject is None else _Question.of(options, model, tokenizer, ids)
    found = _looked_at(options, model, tokenizer, traced, len(ids))
    found.save(options.out)
    console = Console()
    say(console, f"wrote {options.out}: {len(ids)} tokens, {options.out.stat().st_size:,} bytes")
    if found.trace is not None and options.plot is not None:
        found.trace.draw(EVERYTHING, options.plot)
        say(console, f"wrote {options.plot}")
    if options.json is not None:
        found.result().save(options.json)
        say(console, f"wrote {options.json}")


def _check(options: Options) -> None:
    """ValueError for what would only be found out after the work was done."""
    if (options.subject is None) != (options.answer is None):
        missing = "--answer" if options.answer is None else "--subject"
        raise ValueError(f"a trace needs a subject and an answer; give {missing} as well")
    if options.plot is not None and options.subject is None:
        raise ValueError("--plot draws a trace; give --subject and --answer as well")
    for path, check in (
        (options.out, check_page),
        (options.plot, check_picture),
        (options.json, check_result),
    ):
        if path is not None:
            if not path.resolve().parent.is_dir():
                raise ValueError(f"there is no folder {path.parent} to write {path.name} into")
            check(path)


@dataclass(frozen=True)
class _Question:
    """What is traced: a prompt, the positions of its subject, and the id of its answer."""

    ids: list[int]
    subject: list[int]
    answer: int
    texts: list[str]

    @classmethod
    def of(cls, options: Options, model: Model, tokenizer: Tokenizer, ids: list[int]) -> _Question:
        assert options.subject is not None and options.answer is not None
        answer = tokenizer.encode(options.answer)
        if not answer:
            raise ValueError("the answer is empty; --answer is the text that should follow")
        texts = [token_text(tokenizer, i) for i in ids]
        return cls(ids, subject_positions(options.subject, tokenizer, ids), answer[0], texts)

    def traced(self, options: Options, model: Model, note: Callable[[int], object]) -> Trace:
        """Trace the answer."""
        return causal_trace(
            model,
            torch.tensor(self.ids, device=model.device),
            self.subject,
            self.answer,
            generator=torch.Generator().manual_seed(options.seed),
            noise=options.noise,
            samples=options.samples,
            texts=self.texts,
            note=note,
        )


def _looked_at(
    options: Options, model: Model, tokenizer: Tokenizer, question: _Question | None, tokens: int
) -> Analysis:
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    layers = model.config.num_layers
    steps = layers + (tokens if options.effects else 0)
    steps += len(places(model)) * layers if question else 0
    with progress_bar(console) as bar:
        task = bar.add_task("analyze", total=steps, note="reading")

        def note(what: str) -> Callable[[int], object]:
            return lambda done: bar.update(task, advance=done, note=what)

        traced = None if question is None else question.traced(options, model, note("tracing"))
        found = analyze(
            model,
            tokenizer,
            options.text,
            name=options.model,
            effects=options.effects,
            max_tokens=options.max_tokens,
            note=note("reading"),
        )
        bar.remove_task(task)
    if question is None:
        return found
    answer = token_text(tokenizer, question.answer)
    return dataclasses.replace(found, trace=traced, answer=answer)
