"""`EngineThread`: the one thread that runs a scheduler, and what other threads may ask of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from receptance.server.jobs import Event, Job, Ticket
from receptance.server.scheduler import Scheduler


class QueueFull(Exception):
    """More jobs or tokens wait than the server is willing to keep, or the thread is to end."""


class EngineThread:
    """A thread that steps a scheduler as long as there is something to do, and else sleeps.

    `deliver` is called in this thread with the events of each step. All methods may be called from
    any thread. `max_waiting` bounds the jobs in the queue, and `max_waiting_tokens` what their
    prompts hold together. If a step, or the end of a job, raises an error that the scheduler does
    not expect, the jobs that had begun fail, `error` holds it, and the thread goes on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        deliver: Callable[[list[Event]], None],
        *,
        max_waiting: int = 256,
        max_waiting_tokens: int = 1 << 20,
    ) -> None:
        self.scheduler, self._deliver = scheduler, deliver
        self._max_waiting, self._max_tokens = max_waiting, max_waiting_tokens
        self.error: Exception | None = None
        self._condition = threading.Condition()
        self._inbox: deque[Callable[[], list[Event] | None]] = deque()
        self._queued: dict[Ticket, int] = {}  # with the length of its prompt
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread serves."""
        return self._thread.is_alive()

    @property
    def queued(self) -> int:
        """The number of jobs that have not begun."""
        return len(self._queued)

    def submit(self, job: Job, count: int = 1) -> Ticket:
        """Add a job; QueueFull if too much waits. ValueError if it does not fit the model.

        `count` is the number of jobs that come together, of which this is the first: either all
        have room or none is accepted.
        """
        self.scheduler.check(job)
        ticket = Ticket(job)
        with self._condition:
            full = len(self._queued) + count > self._max_waiting + self._free()
            tokens = sum(self._queued.values())
            if self._stopping or full or (tokens and tokens + len(job.prompt) > self._max_tokens):
                raise QueueFull
            self._queued[ticket] = len(job.prompt)
            self._inbox.append(lambda: self.scheduler.submit(ticket))
            self._condition.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a job soon, if it has not ended; of its events some may still come."""
        with self._condition:
            self._queued.pop(ticket, None)
            self._inbox.append(lambda: self.scheduler.cancel(ticket))
            self._condition.notify()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Call a function in this thread, between two steps."""
        future: Future[Any] = Future()

        def answer() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._condition:
            self._inbox.append(answer)
            self._condition.notify()
        return future

    def stop(self) -> None:
        """End the thread after its current step, and wait for it; unfinished jobs get no event."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _free(self) -> int:
        """How many jobs could begin at once; they do not wait although they come by the queue."""
        return max(0, self.scheduler.options.slots - self.scheduler.active)

    def _run(self) -> None:
        scheduler = self.scheduler
        while True:
            with self._condition:
                while not (self._inbox or self._stopping or scheduler.active or scheduler.waiting):
                    self._condition.wait()
                if self._stopping:
                    return
                inbox, self._inbox = self._inbox, deque()
            for act in (*inbox, self._step):
                try:
                    events = act() or []
                except Exception as error:
                    self.error = error
                    events = scheduler.fail("the engine failed")
                self._sort_out(events)

    def _step(self) -> list[Event]:
        idle = not self.scheduler.active and not self.scheduler.waiting
        return [] if idle else self.scheduler.step()

    def _sort_out(self, events: list[Event]) -> None:
        if not events:
            return
        with self._condition:
            for event in events:
                if event.ticket.begun:
                    self._queued.pop(event.ticket, None)
        self._deliver(events)
