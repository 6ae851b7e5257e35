"""Prompts whose positions are looked at, piece by piece: log-probabilities and embeddings."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from receptance.engine.base import Engine
from receptance.inference import sampling, steering
from receptance.inference.reading import head_apart
from receptance.server.jobs import Looked, Score, Ticket
from receptance.state import State

# The logits of so many positions are in memory at once.
_HEAD = 64


class Readings:
    """Jobs that want something of every position; they take turns, piece by piece.

    A prompt is read alone, in pieces of at most `piece` positions, whatever else there is to do. So
    its results do not depend on its company. It is cut at `last`, the length behind which its
    continuations begin, and what follows that is looked at and not kept.
    """

    def __init__(self, engine: Engine, vocab_size: int, *, apart: bool) -> None:
        self._engine, self._vocab_size, self._apart = engine, vocab_size, apart
        self._waiting: deque[_Reading] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ticket: Ticket, last: int) -> None:
        """Read a job's prompt from its beginning."""
        self._waiting.append(_Reading(ticket, last))

    def remove(self, ticket: Ticket) -> None:
        """Forget a job; nothing happens if it is not here."""
        self._waiting = deque(r for r in self._waiting if r.ticket is not ticket)

    def tickets(self) -> list[Ticket]:
        """The jobs that are here."""
        return [reading.ticket for reading in self._waiting]

    @torch.no_grad()
    def step(self, piece: int, budget: int) -> list[Looked]:
        """Read on for about `budget` positions; what was wanted of the prompts that are read.

        Their tickets then have the state behind `last`.
        """
        found = []
        while self._waiting and budget > 0:
            reading = self._waiting[0]
            if not reading.done:
                budget -= self._read_on(reading, piece)
            self._waiting.rotate(-1)
            if reading.done:
                self._waiting.pop()
                found.append(self._looked(reading))
        return found

    def _looked(self, reading: _Reading) -> Looked:
        ticket = reading.ticket
        ticket.read, ticket.state = reading.last, reading.kept
        features = reading.features
        if features is not None and ticket.job.look == "mean":
            features = features / len(ticket.job.prompt)
        return Looked(ticket, reading.scores, None if features is None else features.float())

    def _read_on(self, reading: _Reading, piece: int) -> int:
        """Read one piece; the number of its positions."""
        job, at = reading.ticket.job, reading.at
        end = min(at + piece, reading.last if at < reading.last else reading.end)
        tokens = torch.tensor([job.prompt[at:end]], device=self._engine.device)
        with self._engine.evaluating():
            features, state = self._engine.features(tokens, reading.state)
        if job.look == "last":
            reading.features = features[0, -1].double().cpu()
        elif job.look == "mean":
            total = features[0].double().sum(0).cpu()
            reading.features = total if reading.features is None else reading.features + total
        else:
            for start in range(0, end - at, _HEAD):
                part = features[0, start : start + _HEAD]
                first = at + start + 1  # what stands behind the first of these positions
                following = torch.tensor(job.prompt[first : first + len(part)])
                reading.scores += self._scores(part[: len(following)], following, job.likeliest)
        reading.at, reading.state = end, state
        if end == reading.last:
            reading.kept = state
        return end - at

    def _scores(self, features: Tensor, following: Tensor, count: int) -> list[Score]:
        """How well features [N,C] predict the tokens [N] that follow them."""
        if not len(following):
            return []
        engine = self._engine
        logits = (head_apart(engine, features) if self._apart else engine.head(features)).float()
        logits[:, self._vocab_size :] = -torch.inf
        scores = sampling.log_probabilities(logits)
        own = scores.gather(1, following.to(scores.device)[:, None])[:, 0].tolist()
        best = [steering.likeliest(row, count) if count else () for row in scores]
        return [Score(*pair) for pair in zip(own, best, strict=True)]


class _Reading:
    """How far one prompt has been read."""

    def __init__(self, ticket: Ticket, last: int) -> None:
        self.ticket, self.last = ticket, last
        # What the features at the last position predict is no part of the prompt.
        self.end = len(ticket.job.prompt) - (ticket.job.look == "scores")
        self.at = 0
        self.state: State | None = ticket.job.state
        self.kept: State | None = ticket.job.state
        self.scores: list[Score] = []
        self.features: Tensor | None = None  # the sum of those until here, or the last ones

    @property
    def done(self) -> bool:
        return self.at >= self.end
