"""`Served`: a model with its engine thread, and `Group`: the jobs of one request."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from receptance.data.templates import Template
from receptance.engine.base import Engine
from receptance.server.cache import StateCache
from receptance.server.errors import ApiError
from receptance.server.jobs import Begun, Ended, Event, Failed, Job, Ticket, Wrote
from receptance.server.limits import Limits
from receptance.server.scheduler import Scheduler, SchedulerOptions
from receptance.server.thread import EngineThread, QueueFull
from receptance.state import State
from receptance.tokenizer import Tokenizer

Observe = Callable[[Literal["first", "gap"], float], None]
"""Is told the seconds from a request to its first token, and those between two tokens."""

_LONGEST_PAUSE = 10.0
"""Seconds after which a reader is told that the server is still there."""


class Served:
    """A model with its engine thread; made and used in an event loop."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        cache: StateCache,
        *,
        options: SchedulerOptions | None = None,
        limits: Limits | None = None,
        closing: Callable[[], None] | None = None,
    ) -> None:
        """`closing` is called by `stop`, when the engine has ended."""
        self._closing = closing
        self.name, self.engine, self.tokenizer, self.template = name, engine, tokenizer, template
        self.limits = limits or Limits()
        self.scheduler = Scheduler(engine, tokenizer, cache, options)
        self.observe: Observe = _observe_nothing
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[Ticket, asyncio.Queue[Event]] = {}
        self.thread = EngineThread(
            self.scheduler,
            self._deliver,
            max_waiting=self.limits.max_waiting,
            max_waiting_tokens=self.limits.max_waiting_tokens,
        )

    def start(self) -> None:
        """Begin to serve in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End the engine thread, and wait for it."""
        self.thread.stop()
        if self._closing is not None:
            self._closing()

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._queues)

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the model, the state in which texts begin, and the tokenizer together."""
        digest = hashlib.sha256((self.engine.fingerprint() + self.tokenizer.fingerprint).encode())
        for _, tensor in sorted(self.scheduler.empty.tensors.items()):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def namespace(self, owner: str, salt: str | None, begun: str = "") -> str:
        """The part of the cache in which texts of this owner, salt and beginning are."""
        parts = (self.fingerprint, owner, salt or "", begun)
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def _deliver(self, events: list[Event]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._sort_out, events)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _sort_out(self, events: list[Event]) -> None:
        for event in events:
            if (queue := self._queues.get(event.ticket)) is not None:
                queue.put_nowait(event)

    def submit(self, jobs: Sequence[Job]) -> Group:
        """Jobs that belong together; ApiError if they have no room, or do not fit the model."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        tickets: list[Ticket] = []
        try:
            for number, job in enumerate(jobs):
                ticket = self.thread.submit(job, len(jobs) - number)
                self._queues[ticket] = queue
                tickets.append(ticket)
        except (QueueFull, ValueError) as error:
            self.forget(tickets)
            if isinstance(error, ValueError):
                raise ApiError(400, str(error)) from None
            raise ApiError(
                429, "too many requests wait; try again soon", code="queue_full", retry_after=1
            ) from None
        return Group(self, tickets, queue)

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """Cancel jobs that nobody waits for any more."""
        for ticket in tickets:
            if self._queues.pop(ticket, None) is not None and not ticket.ended:
                self.thread.cancel(ticket)


@dataclass
class Group:
    """The jobs of one request; used as `async with`, which cancels what is left at the end."""

    served: Served
    tickets: list[Ticket]
    _queue: asyncio.Queue[Event]
    cached: int = 0
    """How many tokens of the prompts came from the cache."""
    written: int = 0
    """How many tokens were generated."""
    states: dict[tuple[int, int | None], State] = field(default_factory=dict)
    """The states that were to be kept, by place of the job and number of the continuation."""
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    """When the jobs were submitted, by the clock of the event loop."""
    _last: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompts have."""
        return sum(len(ticket.job.prompt) for ticket in self.tickets)

    async def __aenter__(self) -> Group:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.served.forget(self.tickets)

    async def events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """All events with the place of their job; None stands for a long time without any.

        ApiError if the turn of none of them comes in time, or if the engine fails.
        """
        places = {ticket: place for place, ticket in enumerate(self.tickets)}
        left, begun, waited = len(places), False, 0.0
        while left:
            pause = _LONGEST_PAUSE
            if not begun:
                pause = min(pause, self.served.limits.wait_seconds - waited)
            try:
                async with asyncio.timeout(pause):
                    event = await self._queue.get()
            except TimeoutError:
                waited += pause
                if not begun and waited >= self.served.limits.wait_seconds:
                    raise ApiError(
                        503, "the server is busy; try again later", code="wait", retry_after=5
                    ) from None
                yield None
                continue
            begun = True
            self._note(places[event.ticket], event)
            left -= isinstance(event, Ended) and event.whole
            yield places[event.ticket], event

    def _note(self, place: int, event: Event) -> None:
        match event:
            case Begun(cached=cached):
                self.cached += cached
            case Wrote(token=token, index=index):
                self.written += 1
                now = asyncio.get_running_loop().time()
                before = self._last.get((place, index))
                since = self.began if before is None else before
                self.served.observe("first" if before is None else "gap", now - since)
                self._last[place, index] = now
                if token.finish_reason == "error":
                    raise ApiError(500, "the model found no next token; its state may be damaged")
            case Ended(index=index, state=state) if state is not None:
                self.states[place, index] = state
            case Failed(message=message):
                raise ApiError(500, message)


def _observe_nothing(what: str, seconds: float) -> None:
    """Ignore how long something took."""


def new_id(prefix: str) -> str:
    """A name that nobody can guess, with a beginning that tells what it names."""
    return f"{prefix}{secrets.token_hex(12)}"


def new_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(62)
