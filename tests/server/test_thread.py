"""The engine thread: jobs from other threads, bounds of the queue, errors, the end."""

import queue
import threading

import pytest
from server_cases import Answer, ids, make_scheduler, run

from receptance.inference.rows import Request
from receptance.server.jobs import Ended, Event, Failed, Job, Ticket, Wrote
from receptance.server.thread import EngineThread, QueueFull

LONG = Request(max_tokens=100_000, ignore_end_of_text=True)
SHORT = Request(max_tokens=5)


class Inbox:
    """Events by ticket, for the thread that asks."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def __call__(self, events: list[Event]) -> None:
        for event in events:
            self.events.put(event)

    def until(self, wanted: type, ticket: Ticket) -> list[Event]:
        """All events of a ticket up to the first one of a kind."""
        found: list[Event] = []
        while not found or not isinstance(found[-1], wanted):
            event = self.events.get(timeout=500)
            if event.ticket is ticket:
                found.append(event)
        return found


def job(text: str, *requests: Request) -> Job:
    return Job(prompt=ids(text), requests=requests)


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def thread(inbox):
    thread = EngineThread(make_scheduler("torch", slots=2), inbox, max_waiting=3)
    thread.start()
    yield thread
    thread.stop()
    assert not thread.alive


def test_answers_are_those_without_a_thread(thread, inbox):
    ticket = thread.submit(job("a fox", SHORT))
    answer = Answer()
    for event in inbox.until(Ended, ticket):
        answer.add(event)
    [wanted] = run(make_scheduler("torch"), [ticket.job])
    assert answer.bits() == wanted.bits()


def test_a_full_queue_is_told_and_cancelling_makes_room(thread, inbox):
    running = [thread.submit(job("x", LONG)) for _ in range(2)]
    for ticket in running:
        inbox.until(Wrote, ticket)
    waiting = [thread.submit(job("x", LONG)) for _ in range(3)]
    with pytest.raises(QueueFull):
        thread.submit(job("x", SHORT))
    thread.cancel(waiting[0])
    last = thread.submit(job("x", SHORT))
    for ticket in (*running, *waiting):
        thread.cancel(ticket)
    inbox.until(Ended, last)
    assert (thread.call(lambda: thread.scheduler.active).result(500), thread.queued) == (0, 0)


def test_prompts_that_wait_are_bounded_together(inbox):
    thread = EngineThread(make_scheduler("torch"), inbox, max_waiting_tokens=100)
    thread.submit(job("x" * 300, SHORT))  # alone it may be as long as it likes
    with pytest.raises(QueueFull):
        thread.submit(job("x", SHORT))


def test_jobs_from_many_threads_are_all_answered(thread, inbox):
    ended = []

    def ask(number: int) -> None:
        while True:
            try:
                ended.append(thread.submit(job(f"text {number}", SHORT)))
                return
            except QueueFull:
                threading.Event().wait(0.001)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for each in threads:
        each.start()
    found = set()
    while len(found) < 20:
        event = inbox.events.get(timeout=500)
        if isinstance(event, Ended):
            found.add(event.ticket)
    for each in threads:
        each.join()
    assert found == set(ended)


def test_an_error_at_the_end_of_a_job_does_not_end_the_thread(thread, inbox, monkeypatch):
    cancel, errors = thread.scheduler.cancel, [MemoryError()]

    def once(ticket: Ticket) -> None:
        if errors:
            raise errors.pop()
        cancel(ticket)

    monkeypatch.setattr(thread.scheduler, "cancel", once)
    ticket = thread.submit(job("x", LONG))
    inbox.until(Wrote, ticket)
    thread.cancel(ticket)
    inbox.until(Failed, ticket)
    inbox.until(Ended, thread.submit(job("x", SHORT)))
    assert isinstance(thread.error, MemoryError)


def test_an_unexpected_error_fails_what_has_begun_and_the_thread_goes_on(
    thread, inbox, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(thread.scheduler.slots, "step", lambda: 1 / 0)
        ticket = thread.submit(job("x", SHORT))
        failed = inbox.until(Failed, ticket)[-1]
    assert isinstance(failed, Failed) and failed.message == "the engine failed"
    assert isinstance(thread.error, ZeroDivisionError)
    inbox.until(Ended, thread.submit(job("x", SHORT)))


def test_calls_happen_in_the_thread_and_hand_on_errors(thread):
    assert thread.call(lambda: threading.current_thread().name).result(500) == "engine"
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 / 0).result(500)
