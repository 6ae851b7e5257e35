"""What OpenAI's and Anthropic's own clients make of errors: classes, retries, numbers, helpers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from running_server import Running, make_served, start

from receptance.inference.batching import Slots
from receptance.server.keys import Keys
from receptance.server.thread import QueueFull

openai = pytest.importorskip("openai", reason="the extra test is not installed")
anthropic = pytest.importorskip("anthropic", reason="the extra test is not installed")

KEY = "0123456789abcdef"
TALK: list[Any] = [{"role": "user", "content": "What is a fox?"}]
ASKED: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_tokens": 3}


class Found(BaseModel):
    of: Literal["fox", "dog"]


@pytest.fixture(scope="module")
def locked(tmp_path_factory) -> Iterator[Running]:
    """A server with a key and a small queue."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(KEY)
    yield from start([make_served(max_body=5000)], keys=Keys.read(file))


def clients(url: str, key: str = KEY, **options: Any) -> tuple[Any, Any]:
    options = {"api_key": key, "timeout": 500, "max_retries": 0, **options}
    return (
        openai.OpenAI(base_url=f"{url}/v1", **options),
        anthropic.Anthropic(base_url=url, **options),
    )


def asks(one: Any, other: Any, **more: Any) -> Iterator[tuple[Any, Any]]:
    """The library of each client, and a function that asks by it."""
    yield openai, lambda: one.chat.completions.create(**{**ASKED, **more})
    yield (
        openai,
        lambda: one.responses.create(
            model=more.get("model", "tiny"), input=more.get("messages", TALK), max_output_tokens=3
        ),
    )
    yield anthropic, lambda: other.messages.create(**{**ASKED, **more})


def refused(locked: Running, name: str, key: str = KEY, **more: Any) -> set[int]:
    """The statuses of errors that all have this class."""
    statuses = set()
    for library, ask in asks(*clients(locked.url, key), **more):
        with pytest.raises(getattr(library, name)) as caught:
            ask()
        assert caught.value.request_id.startswith("req_")
        statuses.add(caught.value.status_code)
    return statuses


def test_statuses_are_the_classes_of_the_clients(locked):
    assert refused(locked, "AuthenticationError", key="wrong") == {401}
    assert refused(locked, "NotFoundError", model="gone") == {404}
    king = [{"role": "king", "content": "x"}]
    assert refused(locked, "BadRequestError", messages=king) == {400}
    large = [{"role": "user", "content": "x" * 6000}]
    assert refused(locked, "APIStatusError", messages=large) == {413}


def test_a_state_of_another_model_is_a_conflict(running):
    client, _ = clients(running.url)
    saved = {"save_state": "theirs"}
    client.completions.create(model="other", prompt="x", max_tokens=1, extra_body=saved)
    with pytest.raises(openai.ConflictError):
        client.completions.create(model="tiny", prompt="x", extra_body={"state": "theirs"})


def test_a_full_queue_is_tried_again_when_the_server_says_so(locked, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    thread = locked.app.models.sources["tiny"].served.thread
    submit, full = thread.submit, [True]

    def once(*job: Any) -> Any:
        if full.pop():
            raise QueueFull
        full.append(False)
        return submit(*job)

    monkeypatch.setattr(thread, "submit", once)
    for _, ask in asks(*clients(locked.url, max_retries=1)):
        full[:] = [False, True]
        assert ask().usage
    assert slept == [1.0] * 3
    monkeypatch.setattr(thread, "submit", lambda *job: (_ for _ in ()).throw(QueueFull))
    assert refused(locked, "RateLimitError") == {429}


def test_a_server_that_ends_is_said_to_be_unavailable(locked, monkeypatch):
    monkeypatch.setattr(locked.app, "draining", True)
    assert refused(locked, "InternalServerError") == {503}


def test_an_end_in_the_midst_is_an_error_of_every_stream(monkeypatch):
    step = Slots.step

    def slowly(slots: Slots) -> Any:
        threading.Event().wait(0.02)
        return step(slots)

    monkeypatch.setattr(Slots, "step", slowly)
    asked: dict[str, Any] = {"model": "tiny", "stream": True, "extra_body": {"seed": 3}}
    for run in start([make_served(drain_seconds=0.2)]):
        one, other = clients(run.url)
        answers = [
            one.chat.completions.create(messages=TALK, max_tokens=16000, **asked),
            one.responses.create(input="x", max_output_tokens=16000, **asked),
            other.messages.create(messages=TALK, max_tokens=16000, **asked),
        ]
        streams = [iter(answer) for answer in answers]
        for stream in streams:
            next(stream)
        run.server.should_exit = True
        for stream, library in zip(streams, (openai, openai, anthropic), strict=True):
            with pytest.raises(library.APIError, match="shutting down"):
                list(stream)


def test_answers_have_numbers(running):
    one, other = clients(running.url)
    found = [one.chat.completions.create(**ASKED), other.messages.create(**ASKED)]
    numbers = {answer._request_id for answer in found}
    assert len(numbers) == 2 and all(number.startswith("req_") for number in numbers)


@pytest.mark.parametrize("stream", [False, True])
def test_helpers_read_values_of_a_class(running, stream):
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    one, other = clients(running.url)
    talk = {"model": "tiny", "messages": TALK}
    if stream:
        with one.chat.completions.stream(**talk, response_format=Found) as events:
            for _ in events:
                pass
            chat = events.get_final_completion().choices[0].message.parsed
        with one.responses.stream(model="tiny", input="x", text_format=Found) as events:
            for _ in events:
                pass
            response = events.get_final_response().output_parsed
        with other.messages.stream(**talk, max_tokens=50, output_format=Found) as events:
            message = events.get_final_message().parsed_output
    else:
        chat = one.chat.completions.parse(**talk, response_format=Found).choices[0].message.parsed
        response = one.responses.parse(model="tiny", input="x", text_format=Found).output_parsed
        message = other.messages.parse(**talk, max_tokens=50, output_format=Found).parsed_output
    assert {value.of for value in (chat, response, message)} <= {"fox", "dog"}


def test_what_has_no_effect_is_said_wherever_it_stands(running):
    one, other = clients(running.url)
    named = [{"role": "user", "content": "x", "name": "me"}]
    found = one.chat.completions.create(model="tiny", messages=named, max_tokens=1)
    assert found.warnings == ["messages[].name has no effect"]
    mark = {"type": "ephemeral"}
    part = {"type": "text", "text": "x", "cache_control": mark}
    marked: Any = [{"role": "user", "content": [part]}]
    for options in ({"messages": marked}, {"cache_control": mark}, {"system": [part]}):
        answer = other.messages.create(**{**ASKED, **options})
        assert answer.warnings == ["cache_control has no effect"]


def test_a_failed_tool_and_an_unreadable_thought_are_read(running):
    _, client = clients(running.url)

    def tokens(content: list[Any]) -> int:
        talk: Any = [*TALK, {"role": "assistant", "content": "y"}]
        talk.append({"role": "user", "content": content})
        return client.messages.count_tokens(model="tiny", messages=talk).input_tokens

    result = {"type": "tool_result", "tool_use_id": "a", "content": "gone"}
    assert tokens([{**result, "is_error": True}]) > tokens([result])
    thought = {"type": "redacted_thinking", "data": "?"}
    assert tokens([thought, result]) == tokens([result])
