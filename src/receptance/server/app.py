"""`App`: the server as an ASGI application. It lets in, bounds, answers and lets go."""

from __future__ import annotations

import asyncio
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from starlette.routing import compile_path

from receptance.server.calls import JSON, Call, Reply
from receptance.server.errors import ApiError
from receptance.server.keys import Keys
from receptance.server.memory import Memory
from receptance.server.metrics import MEDIA_TYPE, Metrics
from receptance.server.models import Models
from receptance.server.openapi import docs_page, openapi
from receptance.server.page import page_endpoints
from receptance.server.routes import ENDPOINTS, Endpoint
from receptance.server.serving import Served, new_id
from receptance.server.wire import (
    Gone,
    Headers,
    Receive,
    Scope,
    Send,
    Sender,
    check_headers,
    read_body,
    read_headers,
    until_gone,
)

_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


class App:
    """Serve models over HTTP.

    Without keys everybody may ask who can reach the server; then `hosts` names what the header Host
    may hold, so that no page of another site can ask by a name that it made point here. `log` gets
    one line for each answer, without anything that the client sent.
    """

    def __init__(
        self,
        models: Models,
        *,
        keys: Keys | None = None,
        origins: Sequence[str] = (),
        hosts: frozenset[str] | None = _LOCAL,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.models, self.keys, self.limits = models, keys or Keys(), models.limits
        self.metrics = Metrics(models)
        self.draining = False
        self._memory = Memory()
        self._origins, self._hosts = frozenset(origins), None if self.keys.digests else hosts
        self._log = log or (lambda line: None)
        self._answering: set[asyncio.Task[Any]] = set()
        self.endpoints = (*ENDPOINTS, *self._own_endpoints(), *page_endpoints())
        self._routes = [(compile_path(e.path)[0], e) for e in self.endpoints]

    def _own_endpoints(self) -> Sequence[Endpoint]:
        async def metrics(call: Call) -> Reply:
            """What Prometheus reads."""
            return Reply(self.metrics.text(), MEDIA_TYPE)

        async def description(call: Call) -> Reply:
            """The description of all endpoints, as OpenAPI 3.1."""
            return Reply(msgspec.json.encode(self._described()))

        async def docs(call: Call) -> Reply:
            """The same as a page."""
            page = docs_page(self._described())
            return Reply(page, "text/html; charset=utf-8", headers=_PAGE_POLICY)

        return (
            Endpoint("GET", "/metrics", metrics),
            Endpoint("GET", "/openapi.json", description, public=True),
            Endpoint("GET", "/docs", docs, public=True),
        )

    def _described(self) -> dict[str, Any]:
        return openapi(self.endpoints, list(self.models.sources), keys=bool(self.keys.digests))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (see the ASGI specification)."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    def begin(self) -> None:
        """Start the models that are loaded, in the running event loop."""
        self.models.prepare = self._prepare
        for served in self.models.loaded():
            self._prepare(served)
            served.start()

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.begin()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.models.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _prepare(self, served: Served) -> None:
        served.observe = self.metrics.observe

    def drain(self) -> None:
        """Take no new requests; after a while, end the answers that are still being written."""
        if not self.draining:
            self.draining = True
            loop = asyncio.get_running_loop()
            loop.call_later(self.limits.drain_seconds, self._end_all)

    def _end_all(self) -> None:
        for task in self._answering:
            task.cancel()

    # ---- one request ------------------------------------------------------------------------

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, endpoint = time.monotonic(), None
        headers = read_headers(scope)
        number = new_id("req_")
        sender = Sender(send, self._extra_headers(headers, number), self.limits.send_seconds)
        self.metrics.in_flight.inc()
        try:
            try:
                check_headers(scope)
                endpoint, path = self._match(scope, headers)
                call = await self._admit(endpoint, path, scope, headers, receive)
                await self._run(endpoint, call, receive, sender)
            except ApiError as error:
                if error.__cause__ is not None:  # the one who runs the server has to mend it
                    self._log(f"{error.message}: {error.__cause__}")
                await sender.error(error, endpoint is not None and endpoint.anthropic)
            except Gone:
                sender.status = sender.status or 499  # nginx's number for a client that left
            except Exception as error:
                self._log(f"internal error: {_where(error)}")
                failure = ApiError(500, "internal error")
                await sender.error(failure, endpoint is not None and endpoint.anthropic)
        except (Gone, OSError):
            pass
        finally:
            self.metrics.in_flight.dec()
            self._memory.note(headers)
            place = endpoint.path if endpoint else "none"
            self.metrics.answered(place, sender.status)
            took = time.monotonic() - began
            self._log(f"{number} {scope['method']} {place} {sender.status} {took:.3f} s")

    def _match(
        self, scope: Scope, headers: Mapping[str, str]
    ) -> tuple[Endpoint, Mapping[str, str]]:
        """The endpoint of a request; ApiError if there is none, or if its sender may not ask."""
        path, method = scope["path"], scope["method"]
        found = [(m, e) for regex, e in self._routes if (m := regex.match(path))]
        allowed: set[str] = {e.method for _, e in found}
        if "GET" in allowed:
            allowed.add("HEAD")
        for match, endpoint in found:
            # The server's HTTP layer leaves out the body of what HEAD asks for.
            if endpoint.method == ("GET" if method == "HEAD" else method):
                return endpoint, match.groupdict()
        if method == "OPTIONS" and allowed and headers.get("origin") in self._origins:
            raise ApiError(204, "")
        # Whoever has no key learns nothing of what there is.
        if self.keys.owner(headers) is None:
            raise _no_key()
        if allowed:
            takes = sorted(allowed)
            raise ApiError(405, f"this path takes {' and '.join(takes)}", allow=", ".join(takes))
        raise ApiError(404, "there is nothing at this path", code="unknown_url")

    async def _admit(
        self,
        endpoint: Endpoint,
        path: Mapping[str, str],
        scope: Scope,
        headers: Mapping[str, str],
        receive: Receive,
    ) -> Call:
        """The call of a request whose sender may ask, with its body."""
        owner = self.keys.owner(headers)
        if owner is None and not endpoint.public:
            raise _no_key()
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._hosts is not None and host not in self._hosts | {""}:
            raise ApiError(403, "this server is asked as localhost", code="unknown_host")
        if self.draining and not endpoint.public:
            raise ApiError(503, "the server is shutting down", code="shutdown", retry_after=5)
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        most = endpoint.max_body or self.limits.max_body
        body = await read_body(headers, receive, most, self.limits.send_seconds)
        if endpoint.body is not None and endpoint.body != "state":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != JSON:
                # A page of another site may send other types without asking.
                raise ApiError(415, "the header Content-Type must be application/json")
        return Call(self.models, body, owner or "", path, query)

    async def _run(self, endpoint: Endpoint, call: Call, receive: Receive, sender: Sender) -> None:
        """Answer as long as the client is there."""
        work = asyncio.ensure_future(self._write(endpoint, call, sender))
        gone = asyncio.ensure_future(until_gone(receive))
        self._answering.add(work)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                with suppress(asyncio.CancelledError, ApiError):
                    await work
                raise Gone
            if work.cancelled():
                raise ApiError(503, "the server is shutting down", code="shutdown", retry_after=5)
            await work
        finally:
            self._answering.discard(work)
            gone.cancel()
            work.cancel()
            # Its error holds this frame: in a circle they would keep the body for a long time.
            del work

    async def _write(self, endpoint: Endpoint, call: Call, sender: Sender) -> None:
        answer = await endpoint.answer(call)
        if isinstance(answer, Reply):
            await sender.whole(answer)
            return
        await sender.begin_events()
        try:
            async for piece in answer.pieces:
                await sender.piece(piece)
        except ApiError as error:
            await sender.piece(answer.failure(error))
        except asyncio.CancelledError:
            if not self.draining:
                raise
            ending = ApiError(503, "the server is shutting down", code="shutdown")
            await sender.piece(answer.failure(ending))
        finally:
            close = getattr(answer.pieces, "aclose", None)
            if close is not None:
                await close()
        await sender.piece(answer.end, last=True)

    def _extra_headers(self, headers: Mapping[str, str], number: str) -> Headers:
        # OpenAI's clients read the number of a request in the first of these, Anthropic's in the
        # second.
        found = [(name, number.encode()) for name in (b"x-request-id", b"request-id")]
        found += [(b"x-content-type-options", b"nosniff")]
        if (origin := headers.get("origin")) is not None and origin in self._origins:
            found += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
                (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
                (b"vary", b"origin"),
            ]
        return found


_PAGE_POLICY = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "referrer-policy": "no-referrer",
}


def _no_key() -> ApiError:
    return ApiError(
        401,
        "this server needs an API key in the header Authorization, behind the word Bearer",
        code="invalid_api_key",
    )


def _where(error: Exception) -> str:
    """The kind of an error and where it was raised, without what it says."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name}, line {frame.lineno}"
