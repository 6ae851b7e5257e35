"""The requests of benchmarks/hostile_requests.py, which measures memory as well."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from running_server import Running, make_served, start

from receptance.server.calls import Call

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(
    not (BENCHMARKS / "hostile_requests.py").exists(), reason="the benchmarks are not here"
)


@pytest.fixture(scope="module")
def hostile() -> Iterator[ModuleType]:
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import hostile_requests

        yield hostile_requests
    sys.modules.pop("hostile_requests")


@pytest.fixture(scope="module")
def victim() -> Iterator[Running]:
    yield from start([make_served("model")])


def healthy(client: httpx.Client) -> bool:
    request = {"model": "model", "prompt": "x", "max_tokens": 1}
    return client.post("/v1/completions", json=request).status_code == 200


def test_hostile_bodies_are_answered_and_harm_nobody(hostile, victim):
    headers = {"content-type": "application/json"}
    with victim.client() as client:
        for number, (title, body) in enumerate(hostile.BODIES.items()):
            # The benchmark asks all of them.
            for path in (hostile.PATHS[0], hostile.PATHS[1 + number % (len(hostile.PATHS) - 1)]):
                found = client.post(path, content=body, headers=headers)
                assert found.status_code in (200, 400, 404), (title, path)
                if found.status_code != 200:
                    assert found.json()["error"]["message"], (title, path)
            assert healthy(client), title


def test_hostile_bytes_are_answered_and_harm_nobody(hostile, victim):
    address = victim.url.removeprefix("http://").split(":")
    with victim.client() as client:
        for title, content in hostile.WIRE.items():
            status = hostile.status(hostile.send((address[0], int(address[1])), content))
            fine = title in ("an upgrade",)
            assert (status == 200) if fine else 400 <= status < 500, title
            assert healthy(client), title


def test_what_was_refused_is_forgotten_at_once(victim):
    """An error that its own frames hold would keep the body until Python looks for circles."""
    gc.collect()
    gc.disable()
    try:
        with victim.client() as client:
            for body in ('{"prompt": ', '{"model": "gone", "prompt": "x"}', '{"a": 1}'):
                for path in ("/v1/completions", "/v1/messages", "/v1/responses"):
                    headers = {"content-type": "application/json"}
                    assert client.post(path, content=body, headers=headers).status_code >= 400
            healthy(client)
        kept = [found for found in gc.get_objects() if type(found) is Call]
        assert len(kept) <= 1  # of the last one, which may still be ending
    finally:
        gc.enable()
