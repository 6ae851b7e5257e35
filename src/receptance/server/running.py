"""A server process: sockets, signals, and an end that loses nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from receptance.server.app import App
from receptance.server.limits import MOST_HEADERS

# What is left after the drain to close connections.
_GRACE = 5


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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.drain()
        await super().shutdown(sockets)


def serve(app: App, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until a signal; `ready` is told the address once the server can be asked.

    The first SIGINT or SIGTERM lets answers end (see `Limits.drain_seconds`), a second one does
    not. OSError if the address is in use.
    """
    limits = app.limits
    options: dict[str, Any] = {
        "http": "h11",  # httptools does not bound headers
        "h11_max_incomplete_event_size": MOST_HEADERS,
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "log_level": "error",
        "log_config": None,
        "server_header": False,
        "limit_concurrency": limits.max_connections,
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": int(limits.drain_seconds) + _GRACE,
    }
    bound = _bind(host, port)
    config = uvicorn.Config(app, **options)
    _Server(config, app, ready).run(sockets=[bound])


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
