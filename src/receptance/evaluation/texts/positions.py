"""How the loss falls with the length of what was read before: figure 6 of arXiv 2305.13048v2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from receptance.evaluation.intervals import mean
from receptance.evaluation.results import Curve
from receptance.evaluation.texts.documents import Document
from receptance.evaluation.texts.passages import Passage, carried
from receptance.evaluation.texts.scoring import Scores

# The buckets of positions grow by a factor of two in so many steps.
_PER_OCTAVE = 2


@dataclass(frozen=True)
class Positions:
    """The losses of the first tokens of long documents, in buckets of positions."""

    length: int
    """Documents with fewer tokens are left out, and of the others so many are read. Therefore every
    document counts in every bucket, and the curve shows the position and nothing else."""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"positions is {self.length}; a curve needs at least 2")

    @property
    def edges(self) -> NDArray[np.int64]:
        """Where buckets begin and end, as numbers of tokens before the one that is predicted."""
        octaves = math.log2(self.length)
        steps = 2 ** (np.arange(math.ceil(octaves * _PER_OCTAVE)) / _PER_OCTAVE)
        edges = np.concatenate([[0], np.rint(steps), [self.length]]).astype(np.int64)
        return np.unique(edges)

    def long_enough(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that are read, cut to the length and numbered anew.

        ValueError if there is none.
        """
        number, longest = 0, 0
        for document in documents:
            longest = max(longest, len(document.tokens))
            if len(document.tokens) >= self.length:
                yield self._cut(document, number)
                number += 1
        if not number:
            raise ValueError(
                f"no document has {self.length:,} tokens, and the longest has {longest:,}; set "
                "positions to fewer, or give longer documents"
            )

    def passages(self, document: Document, start: int) -> Iterator[Passage]:
        """What is read of a document, after the token `start`, which is not counted."""
        tokens = np.concatenate([[start], document.tokens])
        return iter([carried((document.number, 0), tokens, self.edges.tolist())])

    def curve(self, scores: Scores, model: str) -> Curve:
        """The mean loss in every bucket, with its interval over documents."""
        edges = self.edges
        widths = np.diff(edges)
        losses = np.stack(scores.sums) / widths
        estimates = [mean(column) for column in losses.T]
        # Positions count from 1: the token at position p has p - 1 tokens before it.
        places = (edges[:-1] + 1 + edges[1:]) / 2
        curve = Curve(
            name="loss against position",
            model=model,
            x_name="position in the document, tokens",
            x=places.tolist(),
            y_name="loss, nats per token",
            y=[each.value for each in estimates],
            about={"bucket edges": edges.tolist(), "documents": len(losses)},
        )
        if len(losses) < 2:
            return curve
        low = [float(each.low or 0.0) for each in estimates]
        high = [float(each.high or 0.0) for each in estimates]
        return replace(curve, low=low, high=high, interval=estimates[0].interval)

    def _cut(self, document: Document, number: int) -> Document:
        share = self.length / len(document.tokens)
        return replace(
            document,
            number=number,
            tokens=document.tokens[: self.length],
            bytes=round(document.bytes * share),
        )
