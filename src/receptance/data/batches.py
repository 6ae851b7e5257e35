"""The order in which training reads tokens.

The order is a pure function of (seed, epoch, step): nothing of it needs to be saved, it does not
depend on how many processes or threads read, and a run that was stopped continues with the very
next batch.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Packing = Literal["auto", "stream", "reset", "whole", "single"]

# This many tokens are searched for the borders of documents at a time.
_SEARCHED_AT_ONCE = 1 << 24
_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """Some rows of tokens, and for each position the token that follows."""

    inputs: Tensor
    """[B,T] int64."""
    targets: Tensor
    """[B,T] int64."""
    mask: Tensor | None = None
    """[B,T] bool: True for the targets to learn; None means all of them."""
    resets: Tensor | None = None
    """[B,T] bool: True where the state is emptied before the position; None means nowhere."""

    @property
    def learned(self) -> int:
        """How many targets count."""
        return self.targets.numel() if self.mask is None else int(self.mask.sum())

    def part(self, rows: slice = slice(None), time: slice = slice(None)) -> Batch:
        """A batch of some of the rows and some of the positions."""
        inputs, targets = self.inputs[rows, time], self.targets[rows, time]
        mask = None if self.mask is None else self.mask[rows, time]
        resets = None if self.resets is None else self.resets[rows, time]
        return Batch(inputs, targets, mask, resets)

    def arrays(self) -> dict[str, Any]:
        """The tensors by name, as arrays that numpy can save."""
        return {name: x.cpu().numpy() for name, x in vars(self).items() if x is not None}

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        both = (None if x is None else x.to(device) for x in (self.mask, self.resets))
        return Batch(self.inputs.to(device), self.targets.to(device), *both)


class Batches:
    """Rows of at most `context` + 1 tokens, each exactly once per epoch, in a seeded order.

    packing says what a row is:
    "stream": a window of the token stream, whatever documents it cuts (the official training);
    "reset": the same windows, but every document in them begins from an empty state;
    "whole": as many whole documents as fit, each from an empty state, and padding that is not
    learned; "single": one document and padding. Of a document longer than the context each piece
    is a row, if there is anything to learn in it. "auto" is "whole" if there is a mask, otherwise
    "stream".
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        context: int,
        batch: int,
        seed: int,
        mask: np.ndarray | None = None,
        packing: Packing = "auto",
        end_of_text: int = 0,
    ) -> None:
        """tokens [N], mask [N] with 1 for the tokens to learn; documents end with end_of_text."""
        self.tokens, self.mask, self.end_of_text = tokens, mask, end_of_text
        self.context, self.batch, self.seed = context, batch, seed
        default: Packing = "stream" if mask is None else "whole"
        self.packing: Packing = default if packing == "auto" else packing
        self._rows: tuple[np.ndarray, np.ndarray] | None = None
        if self.packing in ("whole", "single"):
            lengths = document_lengths(tokens, end_of_text)
            self._rows = _pack(lengths, context, mask, together=self.packing == "whole")
        elif len(tokens) <= context:
            raise ValueError(
                f"the text has {len(tokens)} tokens and the context is {context}; "
                "give more text or a shorter context"
            )
        self.windows = len(self._rows[0]) if self._rows else (len(tokens) - 1) // context
        if not self.windows:
            raise ValueError(
                "the text has no document of at least two tokens, or none with a token to learn; "
                "give more text"
            )

    def at(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        samples = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, places = np.divmod(samples, self.windows)
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            windows[now] = shuffled(places[now], self.windows, (self.seed, int(epoch)))
        return self._read(windows)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows in the order of the text, up to the last one."""
        return self._read(np.arange(start, min(stop, self.windows)))

    def epoch(self, step: int) -> int:
        """The epoch in which a step begins."""
        return step * self.batch // self.windows

    def position(self, step: int) -> int:
        """The place within its epoch at which a step begins, in rows."""
        return step * self.batch % self.windows

    def _read(self, windows: np.ndarray) -> Batch:
        if self._rows:
            starts, stops = self._rows[0][windows], self._rows[1][windows]
        else:
            starts = windows * self.context
            stops = starts + self.context + 1
        tokens = np.full((len(windows), self.context + 1), self.end_of_text, np.int64)
        learned = np.zeros(tokens.shape, bool)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            tokens[row, : stop - start] = self.tokens[start:stop]
            learned[row, : stop - start] = True if self.mask is None else self.mask[start:stop]
        whole = torch.from_numpy(tokens)
        inputs, targets = whole[:, :-1], whole[:, 1:]
        mask = torch.from_numpy(learned[:, 1:]) if self._rows or self.mask is not None else None
        return Batch(inputs, targets, mask, self._resets(inputs))

    def _resets(self, inputs: Tensor) -> Tensor | None:
        """[B,T] bool: True after every end of text, where the next document begins."""
        if self.packing not in ("reset", "whole"):
            return None
        resets = torch.zeros_like(inputs, dtype=torch.bool)
        resets[:, 1:] = inputs[:, :-1] == self.end_of_text
        return resets


class Prefetcher:
    """Batches by step, which threads read ahead; with 0 threads a batch is read when asked for."""

    def __init__(self, batches: Batches, workers: int) -> None:
        self.batches, self.workers = batches, workers
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._pending: dict[int, Future[Batch]] = {}

    def at(self, step: int) -> Batch:
        """The batch of a step; the threads go on with the steps that follow it."""
        if self._pool is None:
            return self.batches.at(step)
        wanted = range(step, step + 1 + self.workers)
        old = self._pending
        self._pending = {s: old.get(s) or self._pool.submit(self.batches.at, s) for s in wanted}
        return self._pending.pop(step).result()


def shuffled(places: np.ndarray, count: int, key: tuple[int, int]) -> np.ndarray:
    """Look up places in a key's permutation of 0 ... count - 1: int64 [N] -> int64 [N].

    A Feistel network permutes the numbers below the next power of four. It is applied again to
    results of count or more until all are less, which is a permutation of the numbers below count
    that takes no memory.
    """
    half = max(1, (int(count - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    out = places.astype(np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        out[outside] = _feistel(out[outside], np.uint64(half), keys)
        outside = out >= count
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low
    for key in keys:
        # The finalizer of splitmix64.
        mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & low)
    return (left << half) | right


def document_lengths(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """The number of tokens of each document, with its end of text: [N] -> [D] int64."""
    ends = [
        np.flatnonzero(tokens[at : at + _SEARCHED_AT_ONCE] == end_of_text) + at + 1
        for at in range(0, len(tokens), _SEARCHED_AT_ONCE)
    ]
    borders = np.concatenate([np.zeros(1, np.int64), *ends, [len(tokens)]])
    lengths = np.diff(borders)
    return lengths if lengths[-1] else lengths[:-1]


def _pack(
    lengths: np.ndarray, context: int, mask: np.ndarray | None, *, together: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The starts and ends of rows.

    Documents are put into rows by next-fit. A document that is longer than the context is cut into
    pieces that overlap by one token, as the last target of one piece is the first input of the
    next. Rows without any target to learn, as of a prompt longer than the context, are left out.
    """
    stops = np.cumsum(lengths)
    rows = []
    document, start = 0, 0
    while document < len(lengths):
        # The last document that ends within reach of this row's start.
        fitting = int(np.searchsorted(stops, start + context + 1, side="right"))
        fitting = fitting if together else min(fitting, document + 1)
        if fitting > document:
            rows.append((start, int(stops[fitting - 1])))
            document, start = fitting, int(stops[fitting - 1])
        else:
            rows.append((start, start + context + 1))
            start += context
    kept = [
        (start, stop)
        for start, stop in rows
        if stop - start > 1 and (mask is None or mask[start + 1 : stop].any())
    ]
    both = np.array(kept, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
