"""`Scheduler`: jobs through one engine, step by step, with the states of earlier texts at hand.

It knows neither threads nor HTTP: whoever owns it calls `submit`, `cancel` and `step`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from receptance.engine.base import Engine
from receptance.errors import out_of_memory
from receptance.inference import reading
from receptance.inference.batching import CHUNK, CHUNK_BESIDE, Slots
from receptance.inference.rows import Left, Request
from receptance.server.cache import StateCache
from receptance.server.jobs import Begun, Ended, Event, Failed, Job, Ticket, Wrote
from receptance.server.queue import FairQueue
from receptance.server.readings import Readings
from receptance.state import State
from receptance.tokenizer import Tokenizer

# A state counts as tiny if the cache could hold so many of them.
_TINY = 4096


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """How an engine is shared between jobs."""

    slots: int = 16
    """Continue at most this number of texts at once."""
    chunk: int = CHUNK
    """Read at most this number of prompt tokens in one step if no text is being continued."""
    chunk_beside: int = CHUNK_BESIDE
    """Read at most this number of prompt tokens in one step beside texts that are continued."""
    interval: int = 512
    """Keep a state behind every so many tokens of a prompt, where states are tiny; 0 keeps none."""
    deterministic: bool = False
    """Answer with the same bits whatever else is being asked, with or without the cache."""

    def __post_init__(self) -> None:
        for name in ("slots", "chunk", "chunk_beside"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.interval < 0:
            raise ValueError(f"interval is {self.interval}; it must be at least 0")


class Scheduler:
    """Jobs that take turns in the slots of an engine.

    Where a prompt begins as an earlier text did, it is continued from the state behind that. States
    are kept behind the turns of a prompt (`Job.marks`), where two texts part, before the last token
    of a prompt, at intervals, and behind every continuation.

    With `deterministic` an answer is the same to the bit whatever the company and whatever is in
    the cache. An engine that is `batch_invariant` gives the same bits with any cut of a text as
    well; for any other one all texts are cut at multiples of `chunk_beside`, and only states there
    are kept. Nothing here may be called by two threads at once.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        cache: StateCache,
        options: SchedulerOptions | None = None,
    ) -> None:
        self.options = options = options or SchedulerOptions()
        self.engine, self.tokenizer, self.cache = engine, tokenizer, cache
        self.slots = Slots(
            engine,
            tokenizer,
            options.slots,
            deterministic=options.deterministic,
            chunk=options.chunk,
            chunk_beside=options.chunk_beside,
        )
        self._apart = options.deterministic and not engine.batch_invariant
        self._grid = options.chunk_beside if self._apart else 1
        self._readings = Readings(engine, tokenizer.vocab_size, apart=self._apart)
        self._queue: FairQueue[Ticket] = FairQueue()
        self._ready: deque[tuple[Ticket, int | None]] = deque()
        self._rows: dict[int, Ticket] = {}
        self._active: dict[Ticket, None] = {}
        self.empty = reading.empty_state(engine)
        """The state of a text of which nothing has been read."""
        tiny = self.empty.nbytes * _TINY <= cache.budget
        self._interval = options.interval if tiny else 0
        self.prompt_tokens = self.cached_tokens = self.written_tokens = 0

    @property
    def waiting(self) -> int:
        """The number of jobs in the queue."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """The number of jobs that have begun and not ended."""
        return len(self._active)

    @property
    def rows(self) -> int:
        """The number of texts in the slots."""
        return len(self._rows)

    def check(self, job: Job) -> None:
        """ValueError if a job's prompt or state does not fit the model; any thread may ask."""
        if not len(reading.token_ids(job.prompt, self.engine.config.vocab_size)):
            raise ValueError("a prompt without tokens; give at least one")

    def submit(self, ticket: Ticket) -> None:
        """Put a job, which `check` has accepted, into the queue."""
        self._queue.push(ticket, ticket.job.client, ticket.job.cost)

    def cancel(self, ticket: Ticket) -> None:
        """End a job wherever it is, without another event; what it has read stays in the cache."""
        if ticket.ended:
            return
        ticket.ended = True
        if self._queue.remove(ticket):
            return
        self._readings.remove(ticket)
        self._ready = deque(item for item in self._ready if item[0] is not ticket)
        for number, index in list(ticket.rows.items()):
            left = self.slots.evict(number)
            del self._rows[number]
            self._remember(ticket, index, left)
        self._active.pop(ticket, None)

    def step(self) -> list[Event]:
        """Go on by one step: every continued text by a token, prompts by a piece."""
        events: list[Event] = []
        try:
            self._begin(events)
            self._look(events)
            if self._rows:
                self._advance(events)
        # The kernels raise RuntimeError, and so does torch if memory runs out.
        except (RuntimeError, MemoryError) as error:
            what = "not enough memory" if out_of_memory(error) else "the engine failed"
            events += self.fail(what)
        return events

    def fail(self, message: str) -> list[Event]:
        """End all jobs that have begun: which of them made the engine fail cannot be known."""
        tickets = list(self._active)
        for ticket in tickets:
            self.cancel(ticket)
        return [Failed(ticket, message) for ticket in tickets]

    # ---- coming in --------------------------------------------------------------------------

    def _begin(self, events: list[Event]) -> None:
        """Fill the free slots: first with jobs that have begun, then with those that wait."""
        while True:
            while self._ready and self.slots.capacity > len(self._rows):
                ticket, index = self._ready.popleft()
                try:
                    self._admit(ticket, index)
                except ValueError as error:  # a state of another model
                    self.cancel(ticket)
                    events.append(Failed(ticket, str(error)))
            busy = len(self._rows) + len(self._readings)
            if self._ready or not len(self._queue) or busy >= self.slots.capacity:
                return
            ticket = self._queue.pop()
            self._active[ticket] = None
            self._plan(ticket)
            events.append(Begun(ticket, ticket.cached))

    def _plan(self, ticket: Ticket) -> None:
        """Look the prompt's beginning up, and decide where on the way its state is kept."""
        job, ticket.begun = ticket.job, True
        self.prompt_tokens += len(job.prompt)
        last = self._on_grid(len(job.prompt) - 1)
        if job.look is not None:
            self._readings.add(ticket, last)
            return
        stops = set[int]()
        if job.namespace is not None:
            found = self.cache.find(job.namespace, job.prompt, last)
            if found.state is not None:
                ticket.read = ticket.cached = found.length
                ticket.state = found.state
                self.cached_tokens += found.length
            stops = {self._on_grid(mark) for mark in job.marks}
            if found.branch is not None:
                stops.add(self._on_grid(found.branch))
            if self._interval:
                step = self._on_grid(self._interval) or self._grid
                stops |= set(range(step, last, step))
        if job.namespace is not None or len(job.requests) > 1:
            stops.add(last)
        ticket.stops = sorted((x for x in stops if ticket.read < x <= last), reverse=True)
        self._go_on(ticket)

    def _on_grid(self, length: int) -> int:
        return length // self._grid * self._grid

    def _go_on(self, ticket: Ticket) -> None:
        """Queue the next piece of a prompt, or its continuations."""
        if ticket.stops or not ticket.job.requests:
            self._ready.append((ticket, None))
        else:
            self._ready.extend((ticket, index) for index in range(len(ticket.job.requests)))

    def _admit(self, ticket: Ticket, index: int | None) -> None:
        job = ticket.job
        if index is None:
            end = ticket.stops[-1] if ticket.stops else len(job.prompt)
            prompt, request = job.prompt[ticket.read : end], Request(max_tokens=0)
        else:
            prompt, request = job.prompt[ticket.read :], job.requests[index]
            ticket.written[index] = []
        number = self.slots.admit(prompt, request, state=ticket.state)
        self._rows[number], ticket.rows[number] = ticket, index

    # ---- through the engine -----------------------------------------------------------------

    def _look(self, events: list[Event]) -> None:
        """Read on in the prompts whose positions are looked at."""
        options = self.options
        piece = options.chunk_beside if self._apart or self._rows else options.chunk
        budget = options.chunk_beside if self._rows else options.chunk
        for looked in self._readings.step(piece, budget):
            ticket = looked.ticket
            events.append(looked)
            self._keep(ticket, ticket.read, ticket.state)
            if ticket.job.requests:
                self._go_on(ticket)
            else:
                self._end(ticket, None, None, events)

    def _advance(self, events: list[Event]) -> None:
        for token in self.slots.step():
            ticket = self._rows[token.row]
            index = ticket.rows[token.row]
            assert index is not None
            self.written_tokens += 1
            ticket.written[index].append(token.id)
            events.append(Wrote(ticket, index, token))
        for number, left in self.slots.left.items():
            ticket = self._rows.pop(number)
            index = ticket.rows.pop(number)
            if index is not None:
                state = self._last_state(left) if ticket.job.keep else None
                self._remember(ticket, index, left)
                self._end(ticket, index, state, events)
                continue
            ticket.read = ticket.stops.pop() if ticket.stops else len(ticket.job.prompt)
            ticket.state = left.state
            self._keep(ticket, ticket.read, left.state)
            if ticket.read == len(ticket.job.prompt):  # a job that only reads
                self._end(ticket, None, left.state, events)
            else:
                self._go_on(ticket)

    @torch.no_grad()
    def _last_state(self, left: Left) -> State | None:
        """The state behind a continuation, its last token included."""
        if not left.unread:
            return left.state
        return reading.read(self.engine, torch.tensor([left.unread]), None, left.state)[1]

    def _end(
        self, ticket: Ticket, index: int | None, state: State | None, events: list[Event]
    ) -> None:
        ticket.left -= index is not None
        ticket.ended = not ticket.left
        if ticket.ended:
            self._active.pop(ticket, None)
        kept = state if ticket.job.keep else None
        events.append(Ended(ticket, index, kept, ticket.ended))

    # ---- remembering ------------------------------------------------------------------------

    def _remember(self, ticket: Ticket, index: int | None, left: Left) -> None:
        """Keep the state of a row that has left the slots, if it is behind a whole token."""
        job = ticket.job
        if index is None:
            end = ticket.stops[-1] if ticket.stops else len(job.prompt)
            self._keep(ticket, end - len(left.unread), left.state)
            return
        if self._grid > 1 or job.namespace is None or left.state is None:
            return
        if left.finish_reason != "error":
            tokens = [*job.prompt, *ticket.written.get(index, [])]
            self.cache.add(job.namespace, tokens[: len(tokens) - len(left.unread)], left.state)

    def _keep(self, ticket: Ticket, length: int, state: State | None) -> None:
        """Keep the state behind the first tokens of a prompt."""
        job = ticket.job
        if job.namespace is not None and state is not None and length % self._grid == 0:
            self.cache.add(job.namespace, job.prompt[:length], state)
