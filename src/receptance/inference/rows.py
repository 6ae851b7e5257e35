"""One text that is being continued: what was asked for, how far it is, what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import SupportsIndex

import torch
from torch import Tensor

from receptance.inference.defaults import fill_defaults
from receptance.inference.sampling import Sampling, Seen, is_counted
from receptance.inference.steering import Constraint, checked_bias
from receptance.inference.streaming import TextStream
from receptance.state import State
from receptance.tokenizer import Tokenizer

# A row draws so many random numbers at once, because one alone costs torch as much as all of these.
_DRAWS = 64

Prompt = str | bytes | Sequence[int]
"""A text, as str or in any bytes, or its token ids."""

Likeliest = tuple[tuple[int, float], ...]
"""Token ids, each with its natural logarithm of probability, the largest first."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of one row."""

    row: int
    id: int
    text: str
    """The text that has become certain with this token. Incomplete characters wait for the next
    one, and so does what may become a stop string."""
    log_probability: float | None
    """The token's natural logarithm of probability under the model itself, before penalties and
    truncation; None if the request did not ask for it."""
    finish_reason: str | None = None
    """On a row's last token: "stop", "end_of_text" or "length"; or "error", with the id -1, if the
    model's logits are not numbers, or if the constraint allows no token."""
    likeliest: Likeliest = ()
    """The likeliest tokens in this place, as many as the request wants."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to continue one text; None stands for an option's default."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    """The longest continuation; with 0 the prompt is read and nothing is generated."""
    stop: Sequence[str] = ()
    """Strings that end the text and are not part of it; a single one may be given as it is."""
    seed: int = 0
    """Decides the random choices of this row, whatever its company."""
    ignore_end_of_text: bool = False
    """Whether to go on behind an end-of-text token."""
    log_probabilities: bool = True
    """False skips computing log-probabilities, which costs a pass over the vocabulary per token."""
    likeliest: int = 0
    """How many of the likeliest tokens to tell in each place, with their log-probabilities."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """What to add to the logits of these token ids before a token is chosen."""
    constraint: Constraint | None = None
    """What the text may be, such as a grammar; it follows this one text and belongs to no other."""

    def __post_init__(self) -> None:
        fill_defaults(self)
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling is {self.sampling!r}; it must be a Sampling")
        for name in ("max_tokens", "seed", "likeliest"):
            value = getattr(self, name)
            if not isinstance(value, SupportsIndex):
                raise ValueError(f"{name} is {value!r}; it must be a whole number")
            object.__setattr__(self, name, value.__index__())
        for name in ("max_tokens", "likeliest"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.likeliest and not self.log_probabilities:
            raise ValueError(
                f"likeliest is {self.likeliest}; it needs log_probabilities, which are switched off"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and less than 2**63")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "bias", checked_bias(self.bias))


def _stop_strings(stop: object) -> tuple[str, ...]:
    if isinstance(stop, str | bytes) or not isinstance(stop, Iterable):
        stop = (stop,)
    strings = tuple(stop)
    if wrong := [s for s in strings if not isinstance(s, str)]:
        raise ValueError(f"a stop string is {wrong[0]!r}; it must be text (str)")
    if not all(strings):
        raise ValueError("an empty stop string would stop before the first token")
    return strings


@dataclass(frozen=True)
class Left:
    """What a row leaves behind: `unread`, as a prompt from `state`, continues the row."""

    state: State | None
    """The state after everything but the unread tokens; None if nothing has been read."""
    unread: list[int]
    """The rest of the prompt, or the last generated token: it is fed when the next is wanted."""
    text: str
    """Text that was held back and is part of no token."""
    finish_reason: str | None = None
    """That of the row's last token; "length" as well if the row was to generate none; None if the
    row was evicted."""


class Row:
    """A request, its prompt, and all else that belongs to one row alone."""

    def __init__(self, number: int, request: Request, prompt: Tensor, tokenizer: Tokenizer) -> None:
        self.number, self.request, self.prompt = number, request, prompt
        self.generated, self.last = 0, -1
        self.seen = Seen()
        self._tokenizer = tokenizer
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

    def take(
        self,
        token: int,
        log_probability: float | None,
        likeliest: Likeliest = (),
    ) -> Token:
        """Go on by one token: the text that is certain with it, and why the row ends if it does."""
        if not self.generated:
            self.prompt = self.prompt.new_empty(0)  # a long prompt's memory is not needed any more
        self.last = token
        self.generated += 1
        text, reason = self._read(token)
        if self.request.sampling.penalizes and reason is None:
            self._count(token)
        if self.request.constraint is not None and reason is None:
            self.request.constraint.take(token)
        return Token(self.number, token, text, log_probability, reason, likeliest)

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

    def _count(self, token: int) -> None:
        options = self.request.sampling
        counted = options.count_digits or is_counted(self._tokenizer.decode_bytes([token]))
        self.seen.add(token, options, counted=counted)

    def left(self, state: State | None, read: int = 0, finish_reason: str | None = None) -> Left:
        """What remains of the row after it has read `read` tokens of its prompt."""
        unread = self.prompt[read:].tolist()
        if self.generated:
            unread = [self.last] if self.last >= 0 else []
        return Left(state, unread, self._text.finish(), finish_reason)
