"""The server that most tests of this folder talk to."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from running_server import Running, make_served, start


@pytest.fixture(scope="package")
def running() -> Iterator[Running]:
    yield from start([make_served(), make_served("other", seed=2)])


@pytest.fixture
def http(running) -> Iterator[httpx.Client]:
    with running.client() as client:
        yield client
