"""What `receptance evaluate` measures of one model: figures, curves, and all that explains them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from receptance.data.sources import Source as File
from receptance.engine.base import Engine
from receptance.evaluation.benchmarks import lambada, paper, tasks
from receptance.evaluation.benchmarks.prefixes import PREFIXES, Prefix
from receptance.evaluation.journal import Journal
from receptance.evaluation.results import Curve, Figure
from receptance.evaluation.tasks import asking
from receptance.evaluation.tasks.base import Task
from receptance.evaluation.texts import enwik8, text
from receptance.evaluation.texts.documents import Document, read_documents
from receptance.evaluation.texts.positions import Positions
from receptance.evaluation.texts.scoring import Layout, Scores, score
from receptance.progress import counted
from receptance.tokenizer import Tokenizer

Progress = Callable[[str, float, float], object]
"""A function that is told what is being done, how much of it is done, and how much it is in all; 0
means that nobody knows."""


@dataclass(frozen=True)
class Model:
    """A model that is measured."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    journal: Path | None = None
    """Where what is computed is kept, so that an interrupted measurement goes on."""

    @contextlib.contextmanager
    def kept(self, **about: Any) -> Iterator[Journal | None]:
        """Open the journal, if there is one; `about` is what decides the records."""
        if self.journal is None:
            yield None
            return
        with Journal(self.journal, text.identity(self.engine, self.tokenizer, **about)) as journal:
            yield journal


@dataclass
class Found:
    """What was found of a model."""

    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which documents of which files are read."""

    files: Sequence[File]
    digest: str
    """One digest for the content of all files."""
    text_field: str = "text"
    limit: int | None = None

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """The documents, encoded."""
        return read_documents(self.files, tokenizer, text_field=self.text_field, limit=self.limit)

    @property
    def bytes(self) -> int:
        """About how many bytes are read."""
        return sum(file.size for file in self.files)

    def about(self) -> dict[str, Any]:
        """What decides the documents."""
        return {"files": self.digest, "text field": self.text_field, "limit": self.limit}


def measure_text(
    model: Model, reading: Reading, options: text.TextOptions, progress: Progress
) -> Found:
    """Bits per byte and perplexity of all documents. ValueError if there are none."""
    documents = reading.documents(model.tokenizer)
    end = model.tokenizer.end_of_text
    if options.whole:
        documents = iter([text.joined(documents, end)])
    scores = _scored(
        model,
        documents,
        lambda document: options.passages(document, end),
        progress,
        reading.bytes,
        **reading.about(),
        protocol=options.protocol,
    )
    if not scores.bytes:
        raise ValueError("there is no document with a token in it; give other text")
    found = Found(text.figures(scores, model.name), details=text.details(scores))
    read = counted(len(scores.bytes), "document"), counted(sum(scores.bytes), "byte")
    found.notes.append(f"{model.name}: {', '.join(read)}, {counted(sum(scores.tokens), 'token')}")
    return found


def measure_positions(
    model: Model, reading: Reading, positions: Positions, progress: Progress
) -> Found:
    """The loss against the position in long documents. ValueError if none is long enough."""
    scores = _scored(
        model,
        positions.long_enough(reading.documents(model.tokenizer)),
        lambda document: positions.passages(document, model.tokenizer.end_of_text),
        progress,
        0,
        **reading.about(),
        positions=positions.length,
    )
    curve = positions.curve(scores, model.name)
    note = f"{model.name}: {len(scores.bytes):,} documents have {positions.length:,} tokens or more"
    return Found(curves=[curve], notes=[note], details=text.details(scores))


def measure_enwik8(
    model: Model,
    file: Path,
    digest: str,
    split: enwik8.Split,
    max_length: int | None,
    progress: Progress,
) -> Found:
    """Bits per character of a split of enwik8, and what the paper prints for others."""
    options = text.TextOptions(whole=True, max_length=max_length)
    end = model.tokenizer.end_of_text
    document = enwik8.read_split(file, split, model.tokenizer)
    scores = _scored(
        model,
        iter([document]),
        lambda document: options.passages(document, end),
        progress,
        document.bytes,
        files=digest,
        split=split,
        protocol=options.protocol,
    )
    bits = text.figures(scores, model.name)[0]
    about = {"split": split, "bytes": document.bytes}
    figure = Figure(
        name="bits per character", value=bits.value, model=model.name, unit="bits", about=about
    )
    printed = [
        Figure(name="bits per character", value=value, model=f"{name} (paper)", unit="bits")
        for name, value in enwik8.published(split).items()
    ]
    return Found([figure, *printed], notes=[enwik8.NOTE], details=text.details(scores))


def measure_lambada(
    model: Model,
    examples: Sequence[tuple[str, str]],
    digest: str,
    prefixes: Sequence[Prefix],
    progress: Progress,
) -> Found:
    """Perplexity and accuracy of the last words, by each protocol that is named."""
    found = Found(notes=[f"{prefix}: {PREFIXES[prefix]}" for prefix in prefixes])
    with model.kept(lambada=digest) as journal:
        for prefix in prefixes:
            scores = lambada.score_lambada(
                model.engine,
                model.tokenizer,
                examples,
                prefix,
                journal=journal,
                progress=functools.partial(progress, f"lambada, prefix {prefix}"),
            )
            found.figures += lambada.figures(scores, prefix, model.name)
            found.details[prefix] = lambada.details(scores)
    return found


def measure_recall(
    model: Model,
    drawn: Sequence[Task],
    count: int,
    seed: int,
    prefix: Prefix,
    progress: Progress,
) -> Found:
    """The accuracy of answers in tasks that are drawn on the fly, each at several difficulties."""
    found = Found(notes=[f"{PREFIXES[prefix]}; each answer is read before the next is asked"])
    with model.kept(recall=seed, prefix=prefix) as journal:
        for task in drawn:
            asked = asking.ask(
                model.engine,
                model.tokenizer,
                task,
                count,
                prefix=prefix,
                seed=seed,
                journal=journal,
                progress=functools.partial(progress, task.name),
            )
            found.figures.append(asking.figure(task, asked, model.name))
    found.curves = asking.curves(drawn, found.figures)
    return found


def measure_tasks(
    model: Model, options: tasks.TaskOptions, samples: int, beside_paper: bool, progress: Progress
) -> Found:
    """The metrics of benchmarks. ValueError if lm-evaluation-harness is not installed."""
    from receptance.evaluation.benchmarks import (
        harness,  # This module imports lm-evaluation-harness.
    )

    about = {"prefix": options.prefix, "max_length": options.max_length}
    with model.kept(**about) as journal:
        run = harness.run_tasks(
            model.engine, model.tokenizer, options, journal=journal, progress=progress
        )
    found = Found(tasks.figures(run.results, model.name))
    found.notes = [f"{model.name}: {options.protocol}", f"{model.name}: {_spared(run)}"]
    for reason in dict.fromkeys(run.missing.values()):
        names = ", ".join(name for name, why in run.missing.items() if why == reason)
        found.notes.append(f"left out: {names}: {reason}")
    results = {name: value for name, value in run.results.items() if name != "samples"}
    if samples:
        results["samples"] = tasks.some_samples(run.results, samples)
    found.details = {
        "harness": results,
        "tokens read": run.tokens_read,
        "tokens spared": run.tokens_spared,
        "answers kept from before": run.kept,
    }
    if beside_paper:
        parameters = model.engine.config.num_parameters
        found.notes.append(f"{model.name}: {paper.size_note(parameters)}")
        compared = paper.compare(found.figures, parameters)
        found.details["paper"] = [
            asdict(each) | {"difference": each.difference} for each in compared
        ]
    return found


def _spared(run: tasks.TaskRun) -> str:
    total = run.tokens_read + run.tokens_spared
    share = f" ({run.tokens_spared / total:.0%})" if total else ""
    kept = f"; {run.kept:,} answers were there from before" if run.kept else ""
    return (
        f"{run.tokens_read:,} tokens were read, and {run.tokens_spared:,}{share} were spared, "
        f"because requests share the beginnings of their contexts{kept}"
    )


def _scored(
    model: Model,
    documents: Iterator[Document],
    layout: Layout,
    progress: Progress,
    total: int,
    **about: Any,
) -> Scores:
    with model.kept(**about) as journal:
        return score(
            model.engine,
            documents,
            layout,
            journal=journal,
            progress=lambda done: progress("reading", done, total),
        )
