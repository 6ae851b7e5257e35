"""`Sticky`: one door to several servers, by which what begins alike comes to the same of them.

The states of a conversation are where its earlier turns were answered. So a request goes by its
beginning: every turn of a conversation has the same, and so have prompts that share one. Each
server has a rank for each beginning (rendezvous hashing: Thaler and Ravishankar 1998), so that a
server that comes or goes moves none but its own share.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from receptance.server import limits
from receptance.server.calls import Streamed
from receptance.server.errors import ApiError
from receptance.server.limits import Limits
from receptance.server.wire import (
    Gone,
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    Sender,
    check_headers,
    read_body,
    read_headers,
    until_gone,
)

# Seconds in which a server that could not be reached is the last to be tried.
_REST = 5.0
_CHARACTERS, _TOKENS = 256, 64
"""How much of a prompt counts as its beginning."""
_ANTHROPIC, _RESPONSES = "/v1/messages", "/v1/responses"


class Unreachable(Exception):
    """A server cannot answer, or not to the end."""


@dataclass(frozen=True)
class Asked:
    """A request that has been read whole."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


Backend = Callable[[Asked], AsyncIterator[Message]]
"""Asks a server: the messages of its answer as those of ASGI, or Unreachable."""


class Sticky:
    """An ASGI application that hands requests on to servers.

    A request that a server did not answer goes to the next one, as long as the client has got
    nothing of an answer; streams that have begun end with an error.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        bounds: Limits | None = None,
        *,
        closing: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`closing` is called at the end."""
        self._backends, self._limits = dict(backends), bounds or Limits()
        self._closing = closing
        self._resting: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on one request (see the ASGI specification)."""
        if scope["type"] == "lifespan":
            for done in ("startup", "shutdown"):
                await receive()
                if done == "shutdown" and self._closing is not None:
                    await self._closing()
                await send({"type": f"lifespan.{done}.complete"})
        elif scope["type"] == "http":
            sender = Sender(send, [], self._limits.send_seconds)
            try:
                await self._answer(scope, receive, sender)
            except ApiError as error:
                await sender.error(error, scope["path"].startswith(_ANTHROPIC))
            except (Gone, OSError):
                pass

    async def _answer(self, scope: Scope, receive: Receive, sender: Sender) -> None:
        check_headers(scope)
        headers, path = read_headers(scope), scope["path"]
        most = self._limits.max_body
        if path.startswith("/v1/states/"):
            most = max(most, limits.LARGEST_STATE)
        body = await read_body(headers, receive, most, self._limits.send_seconds)
        query = scope.get("query_string", b"")
        asked = Asked(scope["method"], path, query, list(scope["headers"]), body)
        key = beginning(path, headers.get("authorization", headers.get("x-api-key", "")), body)
        work = asyncio.ensure_future(self._hand_on(asked, key, sender))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            gone.cancel()
            work.cancel()
            del work  # see App._run

    async def _hand_on(self, asked: Asked, key: bytes, sender: Sender) -> None:
        now = asyncio.get_running_loop().time()
        names = ranked(key, list(self._backends))
        for name in sorted(names, key=lambda name: self._resting.get(name, 0) > now):
            try:
                async with aclosing(_whole(self._backends[name](asked))) as messages:  # type: ignore[type-var]
                    async for message in messages:
                        await sender.take(message)
                return
            except Unreachable:
                self._resting[name] = asyncio.get_running_loop().time() + _REST
                if sender.status:
                    await _break_off(asked.path, sender)
                    return
        raise ApiError(503, "no server can answer now", code="unreachable", retry_after=5)


async def _whole(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """The same messages; the first one is held back until there is something behind it."""
    held: Message | None = None
    async with aclosing(messages) as given:  # type: ignore[type-var]
        async for message in given:
            if held is None and message["type"] == "http.response.start":
                held = message
                continue
            if held:
                yield held
                held = {}
            yield message


async def _break_off(path: str, sender: Sender) -> None:
    """End a stream whose server is gone."""
    if not sender.streams:
        raise Gone  # the length that was told is not reached, so the client knows
    form = Streamed(_nothing(), anthropic=path.startswith(_ANTHROPIC))
    end = b"" if path.startswith((_ANTHROPIC, _RESPONSES)) else form.end
    error = ApiError(503, "the server that wrote this is gone; ask again", code="unreachable")
    await sender.piece(form.failure(error) + end, last=True)


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


def ranked(key: bytes, names: Sequence[str]) -> list[str]:
    """The servers for a beginning, the best first."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode() + b"\0" + key).digest())


def beginning(path: str, owner: str, body: bytes) -> bytes:
    """What decides where a request goes.

    All that concerns named states goes where those of its owner are.
    """
    fields: Any = None
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the server will say
        fields = msgspec.json.decode(body)
    fields = fields if isinstance(fields, dict) else {}
    named = path.startswith("/v1/states") or fields.get("state") or fields.get("save_state")
    first = () if named else _first(fields)
    return hashlib.sha256(msgspec.json.encode((owner, first))).digest()


def _first(fields: dict[str, Any]) -> tuple[Any, ...]:
    parts: list[Any] = [fields.get("model"), fields.get("system"), fields.get("instructions")]
    for name in ("messages", "input", "prompt"):
        value = fields.get(name)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            system = value[0].get("role") in ("system", "developer")
            value = value[: 2 if system else 1]
        elif isinstance(value, list):
            value = value[:_TOKENS] if value and isinstance(value[0], int) else value[:1]
        parts.append(value[:_CHARACTERS] if isinstance(value, str) else value)
    return tuple(parts)


def in_process(app: Callable[[Scope, Receive, Send], Any]) -> Backend:
    """An ASGI application of this process as a server."""

    async def ask(asked: Asked) -> AsyncIterator[Message]:
        queue: asyncio.Queue[Message | None] = asyncio.Queue(8)
        body, gone = [asked.body], asyncio.Event()

        async def receive() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            scope = {"type": "http", "method": asked.method, "path": asked.path}
            scope |= {"query_string": asked.query, "headers": asked.headers}  # type: ignore[dict-item]
            await app(scope, receive, queue.put)
            await queue.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await queue.get()) is not None:
                yield message
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    return
            raise Unreachable
        finally:
            gone.set()
            task.cancel()

    return ask
