"""A server in a thread of this process, with a small random model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from tiny import make_model, small_bpe

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

import uvicorn

from receptance.data.templates import find_template
from receptance.server.app import App
from receptance.server.cache import StateCache
from receptance.server.keys import Keys
from receptance.server.limits import Limits
from receptance.server.models import Models, Source
from receptance.server.running import _bind, _Server, settings
from receptance.server.scheduler import SchedulerOptions
from receptance.server.serving import Served


def make_served(
    name: str = "tiny", *, seed: int = 1, width: int = 16, slots: int = 4, **limits: Any
) -> Served:
    tokenizer = small_bpe()
    return Served(
        name,
        make_model(tokenizer.vocab_size, width=width, seed=seed),
        tokenizer,
        find_template("world"),
        StateCache(1 << 24),
        options=SchedulerOptions(slots=slots, deterministic=True, chunk_beside=8),
        limits=Limits(**limits),
    )


@dataclass
class Running:
    """A server that answers at an address."""

    url: str
    app: App
    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop
    lines: list[str]

    def client(self, key: str = "", **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=500, **options)

    def in_loop(self, function: Any) -> Any:
        """What a function gives that is called in the loop of the server."""

        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(500)


class Server(_Server):
    """A server that leaves the signals of the tests alone."""

    def run_in_loop(self, sockets: list[Any], began: threading.Event, found: list[Any]) -> None:
        async def run() -> None:
            found.append(asyncio.get_running_loop())
            began.set()
            await self._serve(sockets)

        asyncio.run(run())


def start(served: list[Served], *, keys: Keys | None = None, **options: Any) -> Iterator[Running]:
    """A server that runs until the generator goes on."""
    lines: list[str] = []
    sources = [Source(s.name, lambda s=s: s, served=s) for s in served]  # type: ignore[misc]
    app = App(Models(sources, served[0].limits), keys=keys, log=lines.append, **options)
    ready = threading.Event()
    address: list[str] = []

    def say(url: str) -> None:
        address.append(url)
        ready.set()

    server = Server(settings(app), app, say)
    began, found = threading.Event(), list[Any]()
    thread = threading.Thread(
        target=server.run_in_loop, args=([_bind("127.0.0.1", 0)], began, found)
    )
    thread.start()
    assert ready.wait(500)
    yield Running(address[0], app, server, found[0], lines)
    server.should_exit = True
    thread.join(500)
    assert not thread.is_alive()
