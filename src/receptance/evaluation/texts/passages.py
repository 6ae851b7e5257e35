"""The losses of texts of any lengths, read with carried state, many of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from receptance.engine.base import Engine
from receptance.inference.reading import check_weights, empty_state, padded
from receptance.inference.transfer import upload
from receptance.model.inputs import check_ids
from receptance.state import State

Key = tuple[int, int]
"""The number of a document, and that of the passage in it."""

# Up to so many passages are read side by side, by calls of so many positions in all.
_ROWS = {"cpu": 16}
_POSITIONS = {"cpu": 512}
_ROWS_ELSEWHERE, _POSITIONS_ELSEWHERE = 64, 8192
# The logits of so many positions are in memory at once.
_HEAD_CHUNK = 256


@dataclass(frozen=True)
class Passage:
    """Tokens that are read from an empty state, and which of them are predicted for what sum.

    Prediction i is that of tokens[i + 1], after all of tokens[: i + 1]. The sum number b is that of
    the predictions edges[b] to edges[b + 1] - 1; those before the first edge are not counted.
    """

    key: Key
    tokens: NDArray[np.int32]
    """[N + 1]"""
    edges: Sequence[int]
    """Increasing, the last of them at most N."""


@dataclass(frozen=True)
class _Row:
    passage: Passage
    edges: NDArray[np.int64]
    at: int
    sums: NDArray[np.float64]

    @classmethod
    def begin(cls, passage: Passage, at: int = 0, sums: Sequence[float] = ()) -> _Row:
        """A row that has made `at` predictions, with its first sums so far."""
        edges = np.asarray(passage.edges, np.int64)
        missing = np.zeros(len(edges) - 1 - len(sums))
        return cls(passage, edges, at, np.concatenate([np.asarray(sums, np.float64), missing]))

    @property
    def end(self) -> int:
        """The number of predictions that are made."""
        return int(self.edges[-1])

    def after(self, losses: NDArray[np.float64]) -> _Row:
        """The row with the losses of the next predictions [n] counted."""
        places = np.arange(self.at, self.at + len(losses))
        buckets = np.searchsorted(self.edges, places, side="right") - 1
        counted = (buckets >= 0) & (buckets < len(self.sums))
        sums = self.sums.copy()
        np.add.at(sums, buckets[counted], losses[counted])
        return replace(self, at=self.at + len(losses), sums=sums)


@dataclass(frozen=True)
class Unfinished:
    """Passages in the middle of which reading stopped, with all that is needed to go on."""

    state: State
    """A row for each passage."""
    keys: list[Key]
    at: list[int]
    """How many predictions were made of each."""
    sums: list[list[float]]
    """Its sums so far, without zeros at the end."""


class Reader:
    """Reads passages, as many at a time as fit, and returns the sums of each that has ended.

    Each result is that of the passage read alone, up to rounding. The passages come from an
    iterator that is asked when a row is free, so a corpus need not fit into memory. `unfinished`
    goes on with passages where an earlier reader stopped; they have to come from the iterator.
    """

    def __init__(
        self, engine: Engine, passages: Iterable[Passage], unfinished: Unfinished | None = None
    ) -> None:
        check_weights(engine)
        self._engine, self._passages = engine, iter(passages)
        kind = engine.device.type
        self._capacity = _ROWS.get(kind, _ROWS_ELSEWHERE)
        self._positions = _POSITIONS.get(kind, _POSITIONS_ELSEWHERE)
        self._empty = empty_state(engine)
        # Both change in one assignment: whatever interrupts a step, they belong together.
        self._standing: tuple[list[_Row], State | None] = [], None
        self._resumed = {} if unfinished is None else _by_key(unfinished)

    @torch.no_grad()
    def step(self) -> Iterator[tuple[Key, NDArray[np.float64]]] | None:
        """Read on in all rows; the passages that ended with their sums [edges - 1] in nats.

        None when all passages have been read. ValueError for a token that the model does not know.
        """
        self._fill()
        rows, before = self._standing
        if not rows:
            return None
        count = max(1, self._positions // len(rows))
        losses, state = self._losses([self._piece(row, count) for row in rows], before)
        rows = [row.after(found) for row, found in zip(rows, losses, strict=True)]
        going = [i for i, row in enumerate(rows) if row.at < row.end]
        kept = state if len(going) == len(rows) else state.rows(going)
        self._standing = [rows[i] for i in going], kept
        return iter([(row.passage.key, row.sums) for row in rows if row.at >= row.end])

    @property
    def unfinished(self) -> Unfinished | None:
        """Where reading stands; None if no passage is in the middle."""
        rows, state = self._standing
        if state is None or not rows:
            return None
        return Unfinished(
            state,
            [row.passage.key for row in rows],
            [row.at for row in rows],
            [np.trim_zeros(row.sums, "b").tolist() for row in rows],
        )

    @property
    def predictions(self) -> int:
        """How many predictions were made of the passages that are in the middle."""
        return sum(row.at for row in self._standing[0])

    def _fill(self) -> None:
        """Give free rows to the passages that come next."""
        rows, before = self._standing
        coming = list(islice(self._passages, self._capacity - len(rows)))
        if not coming:
            return
        states = [] if before is None else [before]
        for passage in coming:
            check_ids(torch.from_numpy(passage.tokens), self._engine.config.vocab_size)
            (at, sums), state = self._resumed.get(passage.key, ((0, []), self._empty))
            rows = [*rows, _Row.begin(passage, at, sums)]
            states.append(state)
        self._standing = rows, State.cat(states)

    def _piece(self, row: _Row, count: int) -> Tensor:
        """The tokens of the next predictions, inputs and targets together: int64 [n + 1]."""
        end = min(row.at + count, row.end)
        return torch.from_numpy(row.passage.tokens[row.at : end + 1].astype(np.int64))

    def _losses(
        self, pieces: Sequence[Tensor], before: State | None
    ) -> tuple[list[NDArray[np.float64]], State]:
        engine = self._engine
        tokens, sizes = padded([piece[:-1] for piece in pieces])
        lengths = None if sizes is None else upload(torch.tensor(sizes), engine.device)
        with engine.evaluating():
            features, state = engine.features(
                upload(tokens, engine.device), before, lengths=lengths
            )
            counts = [len(piece) - 1 for piece in pieces]
            read = torch.cat([row[:count] for row, count in zip(features, counts, strict=True)])
            targets = upload(torch.cat([piece[1:] for piece in pieces]), engine.device)
            losses = torch.cat(
                [
                    F.cross_entropy(engine.head(x).float(), y, reduction="none")
                    for x, y in zip(
                        read.split(_HEAD_CHUNK), targets.split(_HEAD_CHUNK), strict=True
                    )
                ]
            )
        return np.split(losses.double().cpu().numpy(), np.cumsum(counts)[:-1]), state


def read_all(
    engine: Engine,
    passages: Sequence[Passage],
    found: Callable[[Key, NDArray[np.float64]], object],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Read passages; found is told the sums of each, and progress the predictions, done and in all.

    ValueError for a token that the model does not know.
    """
    lengths = {passage.key: int(passage.edges[-1]) for passage in passages}
    done, total = 0, sum(lengths.values())
    reader = Reader(engine, passages)
    while (ended := reader.step()) is not None:
        for key, sums in ended:
            done += lengths[key]
            found(key, sums)
        progress(done + reader.predictions, total)


def _by_key(unfinished: Unfinished) -> Mapping[Key, tuple[tuple[int, list[float]], State]]:
    places = zip(unfinished.at, unfinished.sums, strict=True)
    return {
        key: (place, unfinished.state.rows(row))
        for row, (key, place) in enumerate(zip(unfinished.keys, places, strict=True))
    }


def carried(key: Key, tokens: ArrayLike, edges: Sequence[int] | None = None) -> Passage:
    """A passage that is read as a whole, with carried state; tokens [N + 1] begin with a start."""
    found = np.asarray(tokens, np.int32)
    return Passage(key, found, [0, len(found) - 1] if edges is None else edges)


def windows(document: int, tokens: ArrayLike, length: int) -> Iterator[Passage]:
    """Passages of at most `length` predictions each, as published perplexities have them.

    tokens [N + 1] begin with a start. Each token is predicted once. A window begins with the last
    token of the one before it, and the last window is as long as the others: it reads again what it
    does not count. This is `get_rolling_token_windows` of lm-evaluation-harness 0.4.13 with a
    context_len of 1.
    """
    found = np.asarray(tokens, np.int32)
    for number, start in enumerate(range(0, len(found) - 1, length)):
        end = min(start + length, len(found) - 1)
        begin = max(0, end - length) if number else 0
        yield Passage((document, number), found[begin : end + 1], [start - begin, end - begin])
