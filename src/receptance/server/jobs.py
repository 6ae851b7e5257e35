"""What the engine is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from receptance.inference.rows import Likeliest, Request, Token
from receptance.state import State


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt and its continuations, which begin in the state behind it and do not see each other.

    The prompt is read once, however many continuations there are. Its beginning comes from the
    cache of the namespace if a text there begins in the same way, unless every position is wanted.
    """

    prompt: Sequence[int]
    """At least one token id."""
    requests: tuple[Request, ...] = ()
    """How to continue the prompt, once for each; without one, the prompt is only read."""
    namespace: str | None = None
    """Which texts of the cache are of use; None keeps away from the cache."""
    marks: Sequence[int] = ()
    """Lengths of the prompt at which another text may go on, such as those where turns begin."""
    state: State | None = None
    """The state of one row in which the prompt begins. The namespace has to tell it from others."""
    client: str = ""
    """Whose job it is; clients get equal shares."""
    look: Literal["scores", "mean", "last"] | None = None
    """What is wanted of the positions of the prompt: the log-probabilities of their tokens, the
    mean of their features, or the features of the last one."""
    likeliest: int = 0
    """With scores, how many of the likeliest tokens to tell in each place of the prompt."""
    keep: bool = False
    """Whether the state behind each continuation is wanted; the last token is read for it."""

    @property
    def cost(self) -> int:
        """The positions that the engine has to read for it, at most."""
        return len(self.prompt) + sum(request.max_tokens for request in self.requests)


@dataclass(frozen=True, slots=True)
class Score:
    """How well the model predicted one token of a prompt."""

    log_probability: float
    likeliest: Likeliest = ()


class Ticket:
    """A job on its way through the engine; it is compared by identity."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.read = 0
        """How many tokens of the prompt have been read."""
        self.cached = 0
        """How many of them came from the cache."""
        self.state = job.state
        """The state behind these."""
        self.stops: list[int] = []
        """Lengths of the prompt at which its state is kept, the next one last."""
        self.rows: dict[int, int | None] = {}
        """Its rows in the slots: the number of the continuation, or None for a piece of prompt."""
        self.written: dict[int, list[int]] = {}
        """The tokens of each continuation that has begun."""
        self.left = len(job.requests)
        """How many continuations have not ended."""
        self.begun = self.ended = False


@dataclass(frozen=True, slots=True)
class Begun:
    """The job has left the queue."""

    ticket: Ticket
    cached: int


@dataclass(frozen=True, slots=True)
class Looked:
    """What was wanted of the positions of the prompt."""

    ticket: Ticket
    scores: list[Score] = field(default_factory=list)
    """Those of the prompt's tokens but the first, which nothing predicts."""
    features: Tensor | None = None
    """The features that were wanted [C]."""


@dataclass(frozen=True, slots=True)
class Wrote:
    """A continuation has one more token."""

    ticket: Ticket
    index: int
    token: Token


@dataclass(frozen=True, slots=True)
class Ended:
    """A continuation, or a job without any, has ended."""

    ticket: Ticket
    index: int | None
    state: State | None = None
    """The state behind it, if it was to be kept."""
    whole: bool = False
    """Whether this ends the job."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job has ended without a result, because the engine failed."""

    ticket: Ticket
    message: str


Event = Begun | Looked | Wrote | Ended | Failed
