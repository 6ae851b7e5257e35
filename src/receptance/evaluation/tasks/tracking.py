"""Tasks of state tracking: the product of everything read so far, in a group.

Parity is the group of two elements. The word problem of S5, the permutations of five things, is
complete for NC1 (Barrington 1989), and Merrill et al. (arXiv 2404.08819) use it to tell which
architectures can track a state.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from receptance.data.labeled import Split
from receptance.evaluation.tasks.base import Drawn, Task, check_at_least


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Zeros and ones: after each, whether the ones so far are odd in number."""

    name: ClassVar[str] = "parity"
    length: int = 32
    """T. There are 2^T strings, which are divided between the splits."""

    def __post_init__(self) -> None:
        check_at_least(self, length=1)

    @property
    def vocab_size(self) -> int:
        """The number of token ids in inputs and answers."""
        return 2

    @property
    def chance(self) -> float:
        """The accuracy of guessing among the possible answers."""
        return 0.5

    def at_length(self, length: int) -> Parity:
        """The same task at another length."""
        return replace(self, length=length)

    def draw(self, rng: np.random.Generator, count: int, split: Split) -> Drawn:
        """Draw so many sequences."""
        tokens = rng.integers(2, size=(count, self.length))
        mask = np.ones(tokens.shape, bool)
        return Drawn(tokens, np.cumsum(tokens, axis=1) % 2, mask, tokens)


@dataclass(frozen=True, kw_only=True)
class S5(Task):
    """Permutations of five things: after each, the product of all so far.

    Token n is the n-th of the 120 permutations in lexicographic order, so 0 is the identity. A
    product p q first applies q: (p q)(i) = p(q(i)), and each new permutation is applied last.
    """

    name: ClassVar[str] = "s5"
    length: int = 16
    """T."""

    def __post_init__(self) -> None:
        check_at_least(self, length=1)

    @property
    def vocab_size(self) -> int:
        """The number of token ids in inputs and answers."""
        return len(products())

    @property
    def chance(self) -> float:
        """The accuracy of guessing among the possible answers."""
        return 1 / self.vocab_size

    def at_length(self, length: int) -> S5:
        """The same task at another length."""
        return replace(self, length=length)

    def draw(self, rng: np.random.Generator, count: int, split: Split) -> Drawn:
        """Draw so many sequences."""
        tokens = rng.integers(self.vocab_size, size=(count, self.length))
        targets, state = np.empty_like(tokens), np.zeros(count, np.int64)
        for place in range(self.length):
            state = targets[:, place] = products()[tokens[:, place], state]
        return Drawn(tokens, targets, np.ones(tokens.shape, bool), tokens)


@functools.cache
def products() -> np.ndarray:
    """The multiplication table of S5, [120,120] int64: row p, column q holds the number of p q."""
    elements = np.array(list(itertools.permutations(range(5))))
    composed = elements[:, elements]  # [p,q,i] = p(q(i))
    weights = 5 ** np.arange(4, -1, -1)
    numbers = {int(code): n for n, code in enumerate(elements @ weights)}
    return np.vectorize(numbers.__getitem__, otypes=[np.int64])(composed @ weights)
