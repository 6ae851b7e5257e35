"""The door before several servers elsewhere: requests go to them by their beginning.

    python deploy/router.py --port 8000 http://server-0:8000 http://server-1:8000

It wants httpx besides the extra `serve`. Servers that cannot be reached are passed over, and tried
again a few seconds later.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

import httpx
import uvicorn

from receptance.server.sticky import Asked, Backend, Sticky, Unreachable
from receptance.server.wire import Message

# Headers that are about one connection, or that are made anew for the next.
_OWN = {b"connection", b"content-length", b"host", b"keep-alive", b"transfer-encoding", b"expect"}
# Servers tell readers that they are still there every 10 seconds.
_TIMEOUT = httpx.Timeout(5, read=90)


def door(urls: list[str]) -> Sticky:
    """The door before servers at these addresses."""
    limits = httpx.Limits(max_connections=None)
    client = httpx.AsyncClient(timeout=_TIMEOUT, limits=limits)
    return Sticky({url: elsewhere(url, client) for url in urls}, closing=client.aclose)


def elsewhere(url: str, client: httpx.AsyncClient) -> Backend:
    """The server at an address."""

    async def ask(asked: Asked) -> AsyncIterator[Message]:
        headers = [(name, value) for name, value in asked.headers if name.lower() not in _OWN]
        target = httpx.URL(url).copy_with(raw_path=_target(asked))
        request = client.build_request(asked.method, target, headers=headers, content=asked.body)
        try:
            answer = await client.send(request, stream=True)
            try:
                if answer.status_code == 503:  # it is busy or shutting down
                    raise Unreachable
                kept = [(n.lower(), v) for n, v in answer.headers.raw if n.lower() not in _OWN]
                yield {
                    "type": "http.response.start",
                    "status": answer.status_code,
                    "headers": kept,
                }
                async for piece in answer.aiter_raw():
                    yield {"type": "http.response.body", "body": piece, "more_body": True}
                yield {"type": "http.response.body", "body": b"", "more_body": False}
            finally:
                await answer.aclose()
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise Unreachable from error

    return ask


def _target(asked: Asked) -> bytes:
    path = httpx.URL(path=asked.path).raw_path
    return path + b"?" + asked.query if asked.query else path


def main() -> None:
    """Open the door."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    app = door(options.urls)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
