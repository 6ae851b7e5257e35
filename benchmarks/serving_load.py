"""Whether `receptance serve` stays as it is under load that lasts, and when clients leave.

    python benchmarks/serving_load.py [MODEL] [--minutes N] [--clients N] [--json FILE]

So many clients ask for short answers, one after another, half of them streamed. No status may be
5xx, and no answer cut off; the memory of the server may grow by less than 5 % after the first
minute (or the first half, if that is shorter), and then all gauges have to be 0. After that as many
clients begin long streams and leave: the slots have to be free within a second, and an answer of
ten tokens has to come in 5 s. Prints the figures, then JSON. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import httpx
from _common import report_as_found
from _servers import Server, server

GAUGES = ("slots_used", "active_requests", "waiting_requests")
# States fill this number of MiB in the first minute, and it counts as memory that is used.
_CACHE = "16"


def main() -> None:
    """Ask, leave, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-python")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    with server(options.model, "--cache", _CACHE) as found:
        report_as_found(trials(found, options.minutes, options.clients), options.json)


def trials(found: Server, minutes: float, clients: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of both parts; AssertionError if a bar is missed."""
    figures = asyncio.run(load(found, 60 * minutes, clients))
    yield "load", figures
    assert set(figures["statuses"]) == {200}, figures
    assert not figures["cut off"] and not figures["gauges"], figures
    assert figures["growth after the first minute"] < 0.05, figures
    figures = asyncio.run(leave(found, clients))
    yield "leaving", figures
    assert figures["seconds until slots are free"] < 1, figures
    assert figures["seconds of ten tokens"] < 5, figures


async def load(found: Server, seconds: float, clients: int) -> dict[str, Any]:
    """Many clients for so many seconds."""
    statuses: Counter[int] = Counter()
    cut, memory = [0], list[tuple[float, int]]()
    began = time.monotonic()
    numbers = itertools.count()

    async def ask_on(client: httpx.AsyncClient, stream: bool) -> None:
        while time.monotonic() - began < seconds:
            body = {"model": "model", "prompt": f"def f{next(numbers)}(x):", "max_tokens": 16}
            async with client.stream(
                "POST", "/v1/completions", json={**body, "stream": stream}
            ) as response:
                content = await response.aread()
            statuses[response.status_code] += 1
            cut[0] += stream and not content.endswith(b"data: [DONE]\n\n")

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - began, found.resident()))
            await asyncio.sleep(1)

    async with _client(found, clients) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(ask_on(client, bool(n % 2)) for n in range(clients)))
        watching.cancel()
        gauges = await _gauges(client)
    settled = next((size for when, size in memory if when >= min(60, seconds / 2)), 1)
    return {
        "requests": statuses.total(),
        "statuses": dict(statuses),
        "cut off": cut[0],
        "gauges": {name: value for name, value in gauges.items() if value},
        "resident, MiB": memory[-1][1] / (1 << 20),
        "growth after the first minute": memory[-1][1] / settled - 1,
    }


async def leave(found: Server, clients: int) -> dict[str, Any]:
    """As many clients begin and leave; then one asks."""
    body = {"model": "model", "prompt": "x", "max_tokens": 16000, "ignore_eos": True}

    async def begin(client: httpx.AsyncClient) -> None:
        asked = client.stream("POST", "/v1/completions", json={**body, "stream": True})
        async with asked as response, aclosing(response.aiter_bytes()) as pieces:
            async for _ in pieces:
                await asyncio.sleep(3600)

    async with _client(found, clients) as client:
        tasks = [asyncio.create_task(begin(client)) for _ in range(clients)]
        await asyncio.sleep(3)
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    began = time.monotonic()
    async with _client(found, 1) as client:
        while any((await _gauges(client)).values()):
            await asyncio.sleep(0.02)
        free = time.monotonic() - began
        began = time.monotonic()
        answer = await client.post("/v1/completions", json={**body, "max_tokens": 10})
        took = time.monotonic() - began
    assert answer.json()["usage"]["completion_tokens"] == 10
    return {"seconds until slots are free": free, "seconds of ten tokens": took}


def _client(found: Server, clients: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=clients + 1, max_keepalive_connections=clients + 1)
    return httpx.AsyncClient(base_url=found.url, timeout=None, limits=limits)


async def _gauges(client: httpx.AsyncClient) -> dict[str, float]:
    lines = (await client.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    own = {name: float(values[f'receptance_{name}{{model="model"}}']) for name in GAUGES}
    # This request is being answered as well.
    return {**own, "requests_in_flight": float(values["receptance_requests_in_flight"]) - 1}


if __name__ == "__main__":
    main()
