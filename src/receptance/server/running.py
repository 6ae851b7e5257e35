"""A server process: sockets, signals, and an end that loses nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from receptance.server.app import App
from receptance.server.limits import MOST_HEADERS

# A connection without a request is closed after this many seconds, or twice as many.
_PATIENCE = 30
# What is left after the drain to close connections.
_GRACE = 30


class _Protocol(H11Protocol):
    """Uvicorn's protocol, which also closes connections on which no request comes.

    Uvicorn alone would wait for ever for the end of headers that were begun.
    """

    def connection_made(self, transport: Any) -> None:
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._was_idle = False
        self._watch()

    def _watch(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing():
            return
        if idle and self._was_idle:
            self.transport.close()
            return
        self._was_idle = idle
        self.loop.call_later(_PATIENCE, self._watch)


class _Server(uvicorn.Server):
    """Uvicorn's server, which tells the application when it is to end."""

    def __init__(self, config: uvicorn.Config, app: App, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._app, self._ready = app, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            for each in server.sockets:
                host, port = each.getsockname()[:2]
                self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.force_exit or self.should_exit  # a second signal of any kind
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.drain()
        await super().shutdown(sockets)


def serve(app: App, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until a signal; `ready` is told the address once the server can be asked.

    The first SIGINT or SIGTERM lets answers end (see `Limits.drain_seconds`), a second one does
    not. OSError if the address is in use.
    """
    bound = _bind(host, port)
    _Server(settings(app), app, ready).run(sockets=[bound])


def settings(app: App) -> uvicorn.Config:
    """The settings of uvicorn."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        h11_max_incomplete_event_size=MOST_HEADERS,
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="critical",
        log_config=None,
        server_header=False,
        limit_concurrency=app.limits.max_connections,
        timeout_keep_alive=_PATIENCE,
        timeout_graceful_shutdown=int(app.limits.drain_seconds) + _GRACE,
    )


def _bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot listen at {host}, port {port}: {reason}; choose another port or host"
        ) from None
    return bound
