"""Bits per byte and perplexity of texts, with carried state or in windows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from receptance.engine.base import Engine
from receptance.evaluation.intervals import Estimate, exponential, ratio
from receptance.evaluation.results import Figure, Subject
from receptance.evaluation.texts.documents import Document
from receptance.evaluation.texts.passages import Passage, carried, windows
from receptance.evaluation.texts.scoring import Scores
from receptance.tokenizer import Tokenizer
from receptance.version import __version__

# The sizes and losses of so many documents at most go into a result, one by one.
_LISTED = 10_000


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts are read."""

    whole: bool = False
    """Read all documents as one text, with an end of text between them, which is a token that is
    predicted like others, instead of each document from an empty state."""
    max_length: int | None = None
    """Read windows of at most so many tokens, as published perplexities do, instead of carrying the
    state through all of a text."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 1")

    @property
    def protocol(self) -> str:
        """How texts are read, in words for people who compare figures."""
        unit = "all documents as one text" if self.whole else "each document by itself"
        if self.max_length is None:
            return f"{unit}, with carried state and no windows"
        return f"{unit}, in windows of {self.max_length:,} tokens"

    def passages(self, document: Document, start: int) -> Iterator[Passage]:
        """What is read of a document, after the token `start`, which is not counted."""
        tokens = np.concatenate([[start], document.tokens])
        if self.max_length is None:
            return iter([carried((document.number, 0), tokens)])
        return windows(document.number, tokens, self.max_length)


def joined(documents: Iterable[Document], end_of_text: int) -> Document:
    """All documents as one, with an end of text between two of them. ValueError without any."""
    found = list(documents)
    if not found:
        raise ValueError("there is no document with a token in it; give other text")
    parts = [np.append(document.tokens, end_of_text) for document in found]
    sizes = (
        sum(getattr(each, name) for each in found) for name in ("bytes", "characters", "words")
    )
    return Document(0, np.concatenate(parts)[:-1].astype(np.int32), *sizes)


def subject(name: str, engine: Engine, tokenizer: Tokenizer) -> Subject:
    """The model that was measured: its sizes, its type of weights, its tokenizer."""
    about = engine.config.to_dict() | {
        "engine": type(engine).__name__,
        "device": str(engine.device),
        "weight bytes": engine.weight_bytes,
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids",
        "tokenizer fingerprint": tokenizer.fingerprint,
    }
    return Subject(name=name, fingerprint=engine.fingerprint(), about=about)


def identity(engine: Engine, tokenizer: Tokenizer, **about: Any) -> dict[str, Any]:
    """All that decides what is computed: the beginning of a journal."""
    return {
        "model": engine.fingerprint(),
        # One model has one fingerprint for all types of its weights.
        "weights": f"{type(engine).__name__} {engine.weight_bytes}",
        "tokenizer": tokenizer.fingerprint,
        "version": __version__,
        **about,
    }


def digest(values: Iterable[object]) -> str:
    """One short name for several values, such as the digests of files."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:32]


def figures(scores: Scores, model: str) -> list[Figure]:
    """Bits per byte and per character, and the perplexities, with their intervals.

    They are ratios of sums over all documents. Perplexity per word counts pieces between white
    space, as `word_perplexity` of lm-evaluation-harness does.
    """
    nats = scores.nats
    bits = nats / math.log(2)
    estimates: list[tuple[str, str, Estimate]] = [
        ("bits per byte", "bits", ratio(bits, scores.bytes)),
        ("bits per character", "bits", ratio(bits, scores.characters)),
        ("perplexity per token", "", ratio(nats, scores.tokens).map(exponential)),
        ("perplexity per word", "", ratio(nats, scores.words).map(exponential)),
    ]
    return [
        Figure(
            name=name,
            value=estimate.value,
            model=model,
            unit=unit,
            low=estimate.low,
            high=estimate.high,
            interval=estimate.interval,
        )
        for name, unit, estimate in estimates
    ]


def details(scores: Scores) -> dict[str, Any]:
    """Sizes and losses in all, and document by document if these are not too many."""
    about: dict[str, Any] = {
        "documents": len(scores.bytes),
        **{name: sum(getattr(scores, name)) for name in ("bytes", "characters", "tokens")},
        "nats": float(scores.nats.sum()),
    }
    if len(scores.bytes) <= _LISTED:
        about["by document"] = {
            "bytes": scores.bytes,
            "tokens": scores.tokens,
            "nats": scores.nats.tolist(),
        }
    return about
