"""Benchmarks that are generated: so many examples of each split, every one made from its number.

An example is a pure function of (seed, split, number) and is made when it is first needed. Its hash
decides which split it may belong to, so no test example is ever trained on.
"""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from receptance.data.batches import shuffled
from receptance.data.labeled import Examples, LabeledBatch, Split, padded

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Of 32 remainders of the hash two are held out, as many as of the benchmarks' examples at most.
_REMAINDERS = 32


class GeneratedExamples(Examples):
    """Whole sequences with a class each. Subclasses make one example at a time."""

    def __init__(self, sizes: Mapping[Split, int], seed: int) -> None:
        """sizes is the number of examples of each split; seed decides all of them."""
        for split in _SPLITS:
            if sizes.get(split, 0) < 1:
                raise ValueError(
                    f"the number of {split} examples is {sizes.get(split, 0)}; it must be at "
                    "least 1"
                )
        self.sizes, self.seed = dict(sizes), seed
        self._made: dict[tuple[Split, int], tuple[np.ndarray, int]] = {}

    @abstractmethod
    def make(self, rng: random.Random) -> tuple[np.ndarray, int]:
        """Draw a sequence, [T] of ids or [T,D] of bytes, and its class."""

    def example(self, split: Split, number: int) -> tuple[np.ndarray, int]:
        """An example by its number: its sequence and its class."""
        place = split, number
        if place not in self._made:
            rng = random.Random(f"{self.seed} {split} {number}")
            found = self.make(rng)
            while _split_of(found[0]) != split:
                found = self.make(rng)
            self._made[place] = found
        return self._made[place]

    def count(self, split: Split) -> int | None:
        """The number of examples of a split."""
        return self.sizes[split]

    @property
    def sized(self) -> dict[str, int]:
        """The number of examples of each split, by its name."""
        return {f"{split} examples": size for split, size in self.sizes.items()}

    def train(self, step: int, size: int, seed: int) -> LabeledBatch:
        """The batch of a step; every example comes once per epoch, in a seeded order."""
        places = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        epochs, places = np.divmod(places, self.sizes["train"])
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = shuffled(places[now], self.sizes["train"], (seed, int(epoch)))
        return self._batch("train", places.tolist())

    def held_out(self, split: Split, size: int) -> Iterator[LabeledBatch]:
        """All examples of a split, in the order of their numbers."""
        for at in range(0, self.sizes[split], size):
            yield self._batch(split, range(at, min(at + size, self.sizes[split])))

    def _batch(self, split: Split, numbers: Sequence[int]) -> LabeledBatch:
        found = [self.example(split, number) for number in numbers]
        inputs, lengths = padded([row for row, _ in found], self.problem)
        return LabeledBatch(inputs, torch.tensor([label for _, label in found]), lengths)


def _split_of(row: np.ndarray) -> Split:
    digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
    remainder = int.from_bytes(digest, "big") % _REMAINDERS
    return "test" if remainder == 0 else "validation" if remainder == 1 else "train"
