"""Passkey retrieval: a number hidden somewhere in real text, and a question for it at the end.

The form is that of Mohtashami and Jaggi (arXiv 2305.16300), with text of the user's own as the
haystack. Tokens are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from receptance.data.labeled import Split
from receptance.evaluation.tasks.base import Drawn, Task, check_at_least

_NEEDLE = b" The pass key is %s. Remember it. %s is the pass key. "
_QUESTION = b" What is the pass key? The pass key is "
# The last share of the text is kept for validation and testing.
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """Text, in which a pass key of some digits stands at a random place, and then the question.

    The answers are the digits. Neither a pass key nor a piece of text of the test was trained on.
    """

    name: ClassVar[str] = "passkey"
    text: bytes = field(repr=False)
    """The text that the key is hidden in."""
    length: int = 256
    """T, in bytes, question and answer included."""
    digits: int = 5
    """The digits of a key."""

    def __post_init__(self) -> None:
        check_at_least(self, digits=1, length=self._around + 16)
        if len(self.text) * _HELD_OUT < self.length:
            raise ValueError(
                f"the text for passkey has {len(self.text):,} bytes; sequences of {self.length} "
                f"want {int(self.length / _HELD_OUT):,} of them at least"
            )

    @property
    def _around(self) -> int:
        """The bytes that are not of the text."""
        # The last digit is answered and never read.
        return len(_NEEDLE) - 4 + 2 * self.digits + len(_QUESTION) + self.digits - 1

    @property
    def vocab_size(self) -> int:
        """The number of token ids in inputs and answers."""
        return 256

    @property
    def chance(self) -> float:
        """The accuracy of guessing among the possible answers."""
        return 0.1

    def at_length(self, length: int) -> Passkey:
        """The same task at another length."""
        return replace(self, length=length)

    def spoken(self, drawn: Drawn) -> list[list[tuple[str, str]]]:
        """Each sequence as the text that it is, and its key as the only answer."""
        found = []
        for tokens, key in zip(drawn.tokens, drawn.question, strict=True):
            read = tokens[: len(tokens) - self.digits + 1].astype(np.uint8).tobytes()
            found.append([(read.decode(errors="replace"), "".join(map(str, key)))])
        return found

    def draw(self, rng: np.random.Generator, count: int, split: Split) -> Drawn:
        """Draw so many sequences."""
        hay = self.length - self._around
        text = np.frombuffer(self.text, np.uint8)
        cut = int(len(text) * (1 - _HELD_OUT))
        text = text[:cut] if split == "train" else text[cut:]
        keys = rng.integers(10, size=(count, self.digits))
        starts = rng.integers(len(text) - hay + 1, size=count)
        depths = rng.integers(hay + 1, size=count)
        tokens = np.empty((count, self.length), np.int64)
        for row, key, start, depth in zip(tokens, keys, starts, depths, strict=True):
            number = "".join(map(str, key)).encode()
            piece = text[start : start + hay].tobytes()
            whole = piece[:depth] + _NEEDLE % (number, number) + piece[depth:]
            row[:] = np.frombuffer(whole + _QUESTION + number[:-1], np.uint8)
        targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[:, -self.digits :], mask[:, -self.digits :] = keys + ord("0"), True
        return Drawn(tokens, targets, mask, keys)
