"""Small engines, and jobs run through a scheduler without threads."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from tiny import make_model

from receptance.engine.base import Engine
from receptance.engine.load import native_engine
from receptance.inference.rows import Token
from receptance.ops import native
from receptance.server.cache import StateCache
from receptance.server.jobs import Begun, Ended, Event, Failed, Job, Looked, Ticket, Wrote
from receptance.server.scheduler import Scheduler, SchedulerOptions
from receptance.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
NAMESPACE = "a" * 64


@functools.cache
def make_engine(kind: str) -> Engine:
    model = make_model()
    if kind == "torch":
        return model
    if not native.is_available():
        pytest.skip("the native kernels were not built")
    return native_engine(model.config, dict(model.state_dict()))


def make_scheduler(kind: str = "torch", *, budget: int = 1 << 24, **options: object) -> Scheduler:
    settings = SchedulerOptions(**{"deterministic": True, "chunk_beside": 8, **options})  # type: ignore[arg-type]
    return Scheduler(make_engine(kind), BYTES, StateCache(budget), settings)


@dataclass
class Answer:
    """All events of one job."""

    cached: int = -1
    tokens: dict[int, list[Token]] = field(default_factory=dict)
    looked: Looked | None = None
    ends: list[Ended] = field(default_factory=list)
    failed: str = ""

    def add(self, event: Event) -> None:
        match event:
            case Begun(cached=cached):
                self.cached = cached
            case Wrote(index=index, token=token):
                self.tokens.setdefault(index, []).append(token)
            case Looked():
                self.looked = event
            case Ended():
                self.ends.append(event)
            case Failed(message=message):
                self.failed = message

    def bits(self, index: int = 0) -> list[tuple]:
        """All that was generated, without the numbers of rows."""
        return [
            (t.id, t.text, t.log_probability, t.finish_reason, t.likeliest)
            for t in self.tokens.get(index, [])
        ]


def run(scheduler: Scheduler, jobs: Iterable[Job]) -> list[Answer]:
    """The answers to jobs that come together."""
    tickets = [Ticket(job) for job in jobs]
    for ticket in tickets:
        scheduler.check(ticket.job)
        scheduler.submit(ticket)
    answers = {ticket: Answer() for ticket in tickets}
    while scheduler.active or scheduler.waiting:
        for event in scheduler.step():
            if event.ticket in answers:
                answers[event.ticket].add(event)
    return list(answers.values())


def ids(text: str | Sequence[int]) -> list[int]:
    return BYTES.encode(text) if isinstance(text, str) else list(text)
