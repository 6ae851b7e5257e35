"""One door to several servers: where requests go, and what happens when a server is gone."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from receptance.server.sticky import Asked, Backend, Sticky, Unreachable, beginning, ranked

NAMES = [f"server-{n}" for n in range(5)]
USER, SYSTEM = {"role": "user", "content": "x"}, {"role": "system", "content": "s"}


def test_all_turns_of_a_conversation_go_to_one_server():
    talk = [SYSTEM, USER]
    keys = set()
    for turn in range(5):
        for path in ("/v1/chat/completions", "/v1/messages"):
            body = {"model": "m", "messages": talk, "seed": turn}
            keys.add(beginning(path, "me", json.dumps(body).encode()))
        talk = [*talk, {"role": "assistant", "content": str(turn)}, USER]
    assert len(keys) == 1
    other = json.dumps({"model": "m", "messages": [SYSTEM, {**USER, "content": "y"}]}).encode()
    assert beginning("/v1/chat/completions", "me", other) not in keys
    assert beginning("/v1/chat/completions", "you", json.dumps(body).encode()) not in keys


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "x" * 300 + "a"}, {"prompt": "x" * 300 + "b"}),
        ({"prompt": [1] * 100 + [2]}, {"prompt": [1] * 100}),
        ({"input": [USER, SYSTEM]}, {"input": [USER]}),
        ({"prompt": "a", "state": "s"}, {"prompt": "b", "save_state": "t"}),
    ],
)
def test_what_begins_alike_goes_to_one_server(one, other):
    keys = {beginning("/v1/x", "", json.dumps(body).encode()) for body in (one, other)}
    assert len(keys) == 1
    assert beginning("/v1/states", "", b"") == beginning("/v1/states/s/file", "", b"\x00\xff")


def test_shares_are_equal_and_only_those_of_a_server_that_goes_are_moved():
    keys = [str(n).encode() for n in range(2000)]
    shares = Counter(ranked(key, NAMES)[0] for key in keys)
    assert all(300 < share < 500 for share in shares.values())
    for key in keys:
        best = ranked(key, NAMES)
        assert ranked(key, NAMES[1:]) == [name for name in best if name != NAMES[0]]


# ---- servers that go --------------------------------------------------------------------------

STREAM = b"text/event-stream; charset=utf-8"


def backend(name: str, kind: bytes, pieces: int, *, dies_after: int | None = None) -> Backend:
    """A server that answers its name so many times, or dies before it has."""

    async def ask(asked: Asked) -> AsyncIterator[dict[str, Any]]:
        if dies_after is not None and dies_after < 0:
            raise Unreachable
        headers = [(b"content-type", kind)]
        yield {"type": "http.response.start", "status": 200, "headers": headers}
        for number in range(pieces):
            if dies_after == number:
                raise Unreachable
            body = f"data: {name}\n\n".encode()
            yield {"type": "http.response.body", "body": body, "more_body": number < pieces - 1}

    return ask


def ask(sticky: Sticky, path: str = "/v1/completions", body: bytes = b"{}") -> tuple[int, str]:
    """The status and the text of an answer; "cut" stands behind one without an end."""
    sent: list[Any] = []

    async def run() -> None:
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        await sticky(scope, receive, send)

    asyncio.run(run())
    text = b"".join(message["body"] for message in sent[1:]).decode()
    return sent[0]["status"], text if not sent[-1]["more_body"] else text + "cut"


@pytest.mark.parametrize("kind", [b"application/json", STREAM])
@pytest.mark.parametrize("dies_after", [-1, 0])
def test_who_has_got_nothing_is_answered_by_the_next(kind, dies_after):
    names = ranked(beginning("/v1/completions", "", b"{}"), NAMES[:2])
    sticky = Sticky(
        {
            names[0]: backend(names[0], kind, 2, dies_after=dies_after),
            names[1]: backend(names[1], kind, 2),
        }
    )
    for _ in range(2):
        assert ask(sticky) == (200, f"data: {names[1]}\n\n" * 2)


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/v1/chat/completions", "data: [DONE]\n\n"),
        ("/v1/messages", ""),
        ("/v1/responses", ""),
    ],
)
def test_a_stream_whose_server_goes_ends_with_an_error(path, end):
    sticky = Sticky({"a": backend("a", STREAM, 3, dies_after=2)})
    status, text = ask(sticky, path)
    assert status == 200 and text.startswith("data: a\n\n" * 2)
    failure = text.removeprefix("data: a\n\n" * 2).removesuffix(end)
    event = json.loads(failure.partition("data: ")[2])
    assert "is gone" in event["error"]["message"] and text.endswith(end)


def test_a_whole_answer_that_breaks_off_has_no_end():
    sticky = Sticky({"a": backend("a", b"application/json", 3, dies_after=2)})
    assert ask(sticky)[1].endswith("cut")


def test_without_any_server_the_client_may_come_again():
    status, text = ask(Sticky({"a": backend("a", STREAM, 1, dies_after=-1)}))
    assert status == 503 and json.loads(text)["error"]["code"] == "unreachable"


def test_bodies_are_bounded():
    assert ask(Sticky({}), body=b"x" * (3 << 20))[0] == 413
