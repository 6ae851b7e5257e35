"""ListOps of Long Range Arena: nested lists of minimum, maximum, median and sum modulo 10.

Written anew from the specification in google-research/long-range-arena
(lra_benchmarks/data/listops.py). Brackets that only show the nesting are no tokens, as in
lra_benchmarks/listops/input_pipeline.py.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from receptance.data.arena import LISTOPS_TOKENS
from receptance.data.labeled import Problem, Split
from receptance.evaluation.tasks.generated import GeneratedExamples

# The sizes of the release.
LISTOPS_SIZES: dict[Split, int] = {"train": 96_000, "validation": 2_000, "test": 2_000}
_OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
_END = "]"
# A node is an operator with this probability, otherwise a digit.
_OPERATOR_SHARE = 0.25
_ID = {token: number for number, token in enumerate(LISTOPS_TOKENS)}


@dataclass(frozen=True, kw_only=True)
class ListOpsDifficulty:
    """The named numbers of the specification, with those of the release."""

    max_depth: int = 10
    """The depth of the deepest digit."""
    max_args: int = 10
    """The most arguments of an operator; the fewest are 2."""
    min_length: int = 500
    """A sequence has more tokens than this."""
    max_length: int = 2000
    """A sequence has fewer tokens than this."""

    def __post_init__(self) -> None:
        for name, least in (("max_depth", 2), ("max_args", 2), ("min_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} of listops is {getattr(self, name)}; it must be at least {least}"
                )
        longest = _longest(self.max_depth, self.max_args)
        if self.max_length < self.min_length + 2 or self.min_length >= longest:
            raise ValueError(
                f"no expression has over {self.min_length} and under {self.max_length} tokens "
                f"with max_depth {self.max_depth} and max_args {self.max_args}"
            )


class ListOps(GeneratedExamples):
    """ListOps, generated: the class is the value of the expression, 0 to 9."""

    def __init__(
        self,
        difficulty: ListOpsDifficulty | None = None,
        sizes: Mapping[Split, int] = LISTOPS_SIZES,
        seed: int = 0,
    ) -> None:
        super().__init__(sizes, seed)
        self.difficulty = difficulty or ListOpsDifficulty()

    @property
    def problem(self) -> Problem:
        """One of ten digits for an expression."""
        return Problem(kind="classify", outputs=10, vocab_size=len(LISTOPS_TOKENS))

    @property
    def about(self) -> Mapping[str, Any]:
        """The difficulty, and the number of examples."""
        return {"task": "listops", **vars(self.difficulty), **self.sized, "drawn from": self.seed}

    @property
    def chance(self) -> float:
        """One of ten digits."""
        return 0.1

    def make(self, rng: random.Random) -> tuple[np.ndarray, int]:
        """Draw an expression, [T] of ids, and its value."""
        limits = self.difficulty
        while True:
            tokens: list[str] = []
            value = _expression(rng, tokens, 1, limits)
            if value is not None and limits.min_length < len(tokens) < limits.max_length:
                return np.array([_ID[token] for token in tokens], np.uint8), value


def _expression(
    rng: random.Random, tokens: list[str], depth: int, limits: ListOpsDifficulty
) -> int | None:
    """Append a random expression's tokens and return its value; None once there are too many."""
    if depth >= limits.max_depth or rng.random() > _OPERATOR_SHARE:
        value = rng.randrange(10)
        tokens.append(str(value))
        return value
    at, count = len(tokens), rng.randint(2, limits.max_args)
    tokens.append("")
    values = []
    for _ in range(count):
        part = _expression(rng, tokens, depth + 1, limits)
        if part is None or len(tokens) >= limits.max_length:
            return None
        values.append(part)
    tokens[at] = rng.choice(_OPERATORS)
    tokens.append(_END)
    return applied(tokens[at], values)


def applied(operator: str, values: Sequence[int]) -> int:
    """The value of an operator on its arguments; a median between two digits is rounded down."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[MED":
        return int(statistics.median(values))
    if operator == "[SM":
        return sum(values) % 10
    raise ValueError(f"{operator!r} is no operator of listops; there are {', '.join(_OPERATORS)}")


def evaluated(tokens: Sequence[int]) -> int:
    """The value of an expression of token ids; ValueError if it is none."""
    words = iter([LISTOPS_TOKENS[token] for token in tokens])
    try:
        value = _evaluated(next(words), words)
    except StopIteration:
        raise ValueError("the expression ends before its last bracket closes") from None
    if next(words, None) is not None:
        raise ValueError("tokens follow the end of the expression")
    return value


def _evaluated(word: str, words: Iterator[str]) -> int:
    if word.isdigit():
        return int(word)
    values = []
    while (inner := next(words)) != _END:
        values.append(_evaluated(inner, words))
    return applied(word, values)


def _longest(depth: int, arguments: int) -> int:
    """The tokens of the longest expression, which may be a number with many digits."""
    return 1 if depth == 1 else 2 + arguments * _longest(depth - 1, arguments)
