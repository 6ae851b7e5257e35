"""Tasks of recall: pairs to look up, a pattern to repeat, tokens to copy out of noise.

Multi-query associative recall is that of Zoology (Arora et al., arXiv 2312.04927,
zoology/data/multiquery_ar.py), induction and selective copying those of Mamba (Gu and Dao,
arXiv 2312.00752, section 4.1). They are written anew from these descriptions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from receptance.data.labeled import Split
from receptance.evaluation.tasks.base import Drawn, Task, check_at_least, distinct


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Pairs of key and value, then the keys again: the answer at each is its value.

    A sequence begins with all pairs, each key once. Every key comes again at an even place behind
    them; the gap to the pairs follows a power law. The filler between is random, or token 0.
    """

    name: ClassVar[str] = "mqar"
    pairs: int = 8
    """How many pairs are to be remembered."""
    length: int = 64
    """T, even and at least four times the pairs."""
    vocabulary: int = 8192
    """The first half of it are keys, the second half values."""
    power: float = 0.01
    """The exponent of the gaps, a: their weights are i^(a - 1). With 1 all are equally likely."""
    random_filler: bool = True
    """Whether places without pair and query hold random tokens, which may look like them."""

    def __post_init__(self) -> None:
        check_at_least(self, pairs=1, length=4, vocabulary=4)
        if self.length % 2 or self.length < 4 * self.pairs:
            raise ValueError(
                f"length of mqar is {self.length} for {self.pairs} pairs; it must be even and at "
                f"least {4 * self.pairs}"
            )
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(
                f"pairs of mqar is {self.pairs}; a vocabulary of {self.vocabulary} has "
                f"{self.vocabulary // 2 - 1} keys"
            )
        if not 0 < self.power <= 1:
            raise ValueError(f"power of mqar is {self.power}; it must be over 0 and at most 1")

    @property
    def vocab_size(self) -> int:
        """The number of token ids in inputs and answers."""
        return self.vocabulary

    @property
    def chance(self) -> float:
        """The accuracy of guessing among the possible answers."""
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def at_length(self, length: int) -> MQAR:
        """The same task at another length."""
        return replace(self, length=length)

    def draw(self, rng: np.random.Generator, count: int, split: Split) -> Drawn:
        """Draw so many sequences."""
        first_value, held = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + distinct(rng, count, first_value - 1, self.pairs)
        values = first_value + distinct(rng, count, self.vocabulary - first_value, self.pairs)
        tokens = np.zeros((count, self.length), np.int64)
        tokens[:, 0:held:2], tokens[:, 1:held:2] = keys, values
        places = held + 2 * self._gaps(rng, count)
        rows = np.arange(count)[:, None]
        tokens[rows, places] = keys
        targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[rows, places], mask[rows, places] = values, True
        if self.random_filler:
            filler = rng.integers(self.vocabulary, size=tokens.shape)
            tokens = np.where(tokens == 0, filler, tokens)
        return Drawn(tokens, targets, mask, np.concatenate([keys, values], axis=1))

    def _gaps(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Different gaps for all keys, in pairs of places: [count,pairs].

        The largest of log weight + Gumbel noise are a draw without replacement by these weights.
        """
        room = (self.length - 2 * self.pairs) // 2
        weights = (self.power - 1) * np.log(np.arange(1, room + 1))
        noisy = weights + rng.gumbel(size=(count, room))
        return np.argsort(-noisy, axis=1, kind="stable")[:, : self.pairs]


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Random tokens with one marker among them, then the marker again: what followed it before?"""

    name: ClassVar[str] = "induction"
    length: int = 64
    """T, the last place of which holds the second marker."""
    vocabulary: int = 16
    """Token 0 is the marker."""

    def __post_init__(self) -> None:
        check_at_least(self, length=3, vocabulary=3)

    @property
    def vocab_size(self) -> int:
        """The number of token ids in inputs and answers."""
        return self.vocabulary

    @property
    def chance(self) -> float:
        """The accuracy of guessing among the possible answers."""
        return 1 / (self.vocabulary - 1)

    def at_length(self, length: int) -> Induction:
        """The same task at another length."""
        return replace(self, length=length)

    def draw(self, rng: np.random.Generator, count: int, split: Split) -> Drawn:
        """Draw so many sequences."""
        tokens = rng.integers(1, self.vocabulary, size=(count, self.length))
        rows, places = np.arange(count), rng.integers(self.length - 2, size=count)
        tokens[rows, places] = tokens[:, -1] = 0
        targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[:, -1], mask[:, -1] = tokens[rows, places + 1], True
        return Drawn(tokens, targets, mask, tokens)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Data tokens scattered among noise, then a marker for each: repeat the data in order.

    The markers come after `length` places, so a sequence has `length` + `memorize` of them.
    """

    name: ClassVar[str] = "selective-copying"
    memorize: int = 8
    """How many tokens are to be repeated."""
    length: int = 64
    """The number of places over which they are scattered."""
    vocabulary: int = 16
    """Token 0 is the noise, the last token the marker."""

    def __post_init__(self) -> None:
        check_at_least(self, memorize=1, length=self.memorize, vocabulary=4)

    @property
    def vocab_size(self) -> int:
        """The number of token ids in inputs and answers."""
        return self.vocabulary

    @property
    def chance(self) -> float:
        """The accuracy of guessing among the possible answers."""
        return 1 / (self.vocabulary - 2)

    def at_length(self, length: int) -> SelectiveCopying:
        """The same task at another length."""
        return replace(self, length=length)

    def draw(self, rng: np.random.Generator, count: int, split: Split) -> Drawn:
        """Draw so many sequences."""
        data = rng.integers(1, self.vocabulary - 1, size=(count, self.memorize))
        places = np.sort(distinct(rng, count, self.length, self.memorize), axis=1)
        tokens = np.zeros((count, self.length + self.memorize), np.int64)
        tokens[np.arange(count)[:, None], places] = data
        tokens[:, self.length :] = self.vocabulary - 1
        targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[:, self.length :], mask[:, self.length :] = data, True
        return Drawn(tokens, targets, mask, data)
