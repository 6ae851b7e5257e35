"""Requests and answers on the wire: headers, bodies, and a sender that no reader can hold up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from receptance.server.calls import JSON, Reply
from receptance.server.errors import ApiError
from receptance.server.limits import MOST_HEADERS

Scope = MutableMapping[str, Any]
Headers = list[tuple[bytes, bytes]]
Message = MutableMapping[str, Any]
"""A message of ASGI."""
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_EVENTS = "text/event-stream; charset=utf-8"


class Gone(Exception):
    """The client has left, or takes nothing any more."""


class Sender:
    """The answer to one request, of which every piece has to be taken in time."""

    def __init__(self, send: Send, headers: Headers, seconds: float) -> None:
        self._send, self._headers, self._seconds = send, headers, seconds
        self.status = 0
        """That of the answer; 0 if none has begun."""
        self.streams = False
        """Whether the answer comes in events."""

    async def whole(self, reply: Reply) -> None:
        """Send an answer at once."""
        headers = {
            "content-type": reply.media_type,
            "content-length": str(len(reply.body)),
            **reply.headers,
        }
        await self._begin(reply.status, headers)
        await self.piece(reply.body, last=True)

    async def error(self, error: ApiError, anthropic: bool) -> None:
        """Send an error, if nothing has been sent yet."""
        if self.status:
            raise Gone
        headers = {}
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
        if error.allow is not None:
            headers["allow"] = error.allow
        if error.status in (408, 413):  # the rest of the body is not read
            headers["connection"] = "close"
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        body = msgspec.json.encode(error.anthropic if anthropic else error.openai)
        if error.status == 204:
            body = b""
        await self.whole(Reply(body, JSON, error.status, headers))

    async def begin_events(self) -> None:
        """Begin a stream of events."""
        await self._begin(200, {"content-type": _EVENTS, "cache-control": "no-store"})

    async def piece(self, body: bytes, *, last: bool = False) -> None:
        """Send a piece of the body."""
        await self.take({"type": "http.response.body", "body": body, "more_body": not last})

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        own = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in headers.items()]
        start = {"type": "http.response.start", "status": status}
        await self.take({**start, "headers": own + self._headers})

    async def take(self, message: Message) -> None:
        """Send a message; Gone if it is not taken in time."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kinds = [value for name, value in message["headers"] if name == b"content-type"]
            self.streams = kinds[:1] == [_EVENTS.encode()]
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            raise Gone from None


def read_headers(scope: Scope) -> dict[str, str]:
    """The headers by name in lower case; of several with one name the first."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return found


def check_headers(scope: Scope) -> None:
    """ApiError if the headers and the path are too large together."""
    size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
    # ": " and the end of the line count as well, so that many short headers are large.
    if size + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > MOST_HEADERS:
        raise ApiError(431, f"the headers are larger than {MOST_HEADERS} bytes")


async def read_body(
    headers: Mapping[str, str], receive: Receive, most: int, seconds: float
) -> bytes:
    """The body of a request; ApiError if it is too large, compressed, or does not come."""
    length = headers.get("content-length", "0")
    if len(length) > 12 or (length.isdigit() and int(length) > most):
        raise _too_large(most)
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "a compressed body is not read; leave out Content-Encoding")
    pieces, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                piece = message.get("body", b"")
                size += len(piece)
                if size > most:
                    raise _too_large(most)
                pieces.append(piece)
                if not message.get("more_body"):
                    return b"".join(pieces)
    except TimeoutError:
        raise ApiError(408, "the body did not come in time", code="timeout") from None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")


async def until_gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
