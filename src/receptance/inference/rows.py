"""One text that is being continued: what was asked for, how far it is, what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import SupportsIndex

import torch
from torch import Tensor

from receptance.inference.sampling import Sampling, Seen
from receptance.inference.streaming import TextStream
from receptance.state import State
from receptance.tokenizer import Tokenizer

# Random numbers that are drawn at once: one alone costs torch as much as all of these.
_DRAWS = 64

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of one row."""

    row: int
    id: int
    text: str
    """Text that is certain now: incomplete characters and possible stop strings wait."""
    log_probability: float | None
    """Natural logarithm, under the model itself, before penalties and truncation; None if the
    request did not ask for it."""
    finish_reason: str | None = None
    """Set on a row's last token: "stop", "end_of_text" or "length". Or "error", with the id -1:
    the model's logits are not numbers."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to continue one text."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    """The longest continuation."""
    stop: Sequence[str] = ()
    """Strings that end the text and are not part of it; a single one may be given as it is."""
    seed: int = 0
    """Decides the random choices of this row, whatever its company."""
    ignore_end_of_text: bool = False
    """Whether to go on behind an end-of-text token."""
    log_probabilities: bool = True
    """Whether tokens come with theirs: a pass over the whole vocabulary."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seed"):
            value = getattr(self, name)
            if not isinstance(value, SupportsIndex):
                raise ValueError(f"{name} is {value!r}; it must be a whole number")
            object.__setattr__(self, name, value.__index__())
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and less than 2**63")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if wrong := [s for s in stop if not isinstance(s, str)]:
            raise ValueError(f"a stop string is {wrong[0]!r}; it must be text")
        if not all(stop):
            raise ValueError("an empty stop string would stop before the first token")
        object.__setattr__(self, "stop", stop)


@dataclass(frozen=True)
class Left:
    """What a row leaves behind: it goes on with `unread` as the prompt, from `state`."""

    state: State | None
    """After everything but the unread tokens; None if nothing has been read."""
    unread: list[int]
    """The rest of the prompt, or the last generated token: it is fed when the next is wanted."""
    text: str
    """What was held back and not shown."""


class Row:
    """A request, its prompt, and what belongs to nobody else."""

    def __init__(self, number: int, request: Request, prompt: Tensor, tokenizer: Tokenizer) -> None:
        self.number, self.request, self.prompt = number, request, prompt
        self.generated, self.last = 0, -1
        self.seen = Seen()
        self._end_of_text = -1 if request.ignore_end_of_text else tokenizer.end_of_text
        self._text = TextStream(tokenizer, request.stop)
        self._random = torch.Generator().manual_seed(request.seed)
        self._block: list[float] = []
        self._start = -_DRAWS

    def uniform(self) -> float:
        """The random number in [0, 1) that decides the next token, however often it is asked."""
        if self.generated >= self._start + _DRAWS:
            self._block = torch.rand(_DRAWS, generator=self._random).tolist()
            self._start += _DRAWS
        return self._block[self.generated - self._start]

    def take(self, token: int, log_probability: float | None) -> Token:
        """The next token, with the text that it makes certain and why the row ends with it."""
        if not self.generated:
            self.prompt = self.prompt.new_empty(0)  # it may have been long
        self.last = token
        self.generated += 1
        text, reason = self._read(token)
        if self.request.sampling.penalizes and reason is None:
            self.seen.add(token, self.request.sampling)
        return Token(self.number, token, text, log_probability, reason)

    def _read(self, token: int) -> tuple[str, str | None]:
        if token < 0:
            return self._text.finish(), "error"
        if token == self._end_of_text:
            return self._text.finish(), "end_of_text"
        text, stopped = self._text.push(token)
        if stopped:
            return text, "stop"
        if self.generated == self.request.max_tokens:
            return text + self._text.finish(), "length"
        return text, None

    def left(self, state: State | None, read: int = 0) -> Left:
        """What remains of the row when `read` tokens of the prompt have been read, or all."""
        unread = self.prompt[read:].tolist()
        if self.generated:
            unread = [self.last] if self.last >= 0 else []
        return Left(state, unread, self._text.finish())
