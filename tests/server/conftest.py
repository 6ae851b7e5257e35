"""The server that most tests of this folder talk to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


@pytest.fixture
def client(running) -> Iterator[Any]:
    """OpenAI's own client."""
    openai = pytest.importorskip("openai", reason="the extra test is not installed")
    url = f"{running.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=500) as client:
        yield client
