"""Several models in one server: loaded when asked for, unloaded for others, never in use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from running_server import make_served
from server_cases import BYTES, make_engine
from tiny import make_model

from receptance.data.templates import find_template
from receptance.engine import native_engine
from receptance.engine.base import Engine
from receptance.server.cache import StateCache
from receptance.server.errors import ApiError
from receptance.server.jobs import Job
from receptance.server.models import Models, Source, weight_bytes
from receptance.server.serving import Served

# In every model of these tests.
WEIGHTS = make_served().engine.weight_bytes


class Sources:
    """Models by name, and what happened to them."""

    def __init__(self, *names: str, room: int | None = None) -> None:
        self.happened: list[str] = []
        sources = [Source(name, self._loader(name)) for name in names]
        self.models = Models(sources, budget=None if room is None else room * WEIGHTS)

    def _loader(self, name: str) -> Callable[[], Served]:
        def load() -> Served:
            if name == "broken":
                raise ValueError("the file is damaged")
            self.happened.append(f"load {name}")
            served = make_served(name)
            served._closing = lambda: self.happened.append(f"close {name}")
            return served

        return load

    def loaded(self) -> set[str]:
        return {served.name for served in self.models.loaded()}


def run(sources: Sources, test: Any) -> None:
    async def live() -> None:
        await test(sources.models)
        await sources.models.close()

    asyncio.run(live())


def test_the_one_asked_for_longest_ago_makes_room():
    sources = Sources("a", "b", "c", room=2)

    async def test(models: Models) -> None:
        for name in ("a", "b", "a", "c"):
            assert (await models.served(name)).thread.alive
        assert sources.loaded() == {"a", "c"}
        # Its size is known by now: room is made before it is read again.
        await models.served("b")
        assert sources.happened == [
            *("load a", "load b", "load c", "close b"),
            *("close a", "load b"),
        ]

    run(sources, test)


def test_no_model_makes_room_for_one_that_never_fits():
    sources = Sources("a", room=1)
    sources.models.sources["b"] = Source("b", lambda: make_served("b", width=64))

    async def test(models: Models) -> None:
        await models.served("a")
        for _ in range(2):  # when its size is not known yet, and when it is
            with pytest.raises(ApiError) as caught:
                await models.served("b")
            assert (caught.value.status, caught.value.retry_after) == (503, None)
            assert sources.loaded() == {"a"}

    run(sources, test)


def test_a_model_that_answers_is_not_unloaded_and_the_other_is_let_go():
    sources = Sources("a", "b", room=1)

    async def test(models: Models) -> None:
        served = await models.served("a")
        async with served.submit([Job(prompt=[1, 2], look="mean")]):
            assert not await models.unload("a")
            with pytest.raises(ApiError) as caught:
                await models.served("b")
            assert caught.value.status == 503 and caught.value.retry_after
            assert sources.happened == ["load a", "load b", "close b"]
        await models.served("b")
        assert sources.loaded() == {"b"}

    run(sources, test)


def test_matrices_that_adapters_share_are_counted_once():
    base = make_engine("native")
    matrices = sum(matrix.nbytes for matrix in base.packed.values())
    weights = make_model().state_dict()
    beside = native_engine(base.config, dict(weights), shared=base.packed)
    apart = native_engine(base.config, dict(weights))
    assert weight_bytes([base, beside, beside]) == 3 * base.weight_bytes - 2 * matrices
    assert weight_bytes([base, apart]) == 2 * base.weight_bytes

    def loads(name: str, engine: Engine) -> Callable[[], Served]:
        return lambda: Served(name, engine, BYTES, find_template("world"), StateCache(1 << 20))

    for engine, stays in ((beside, {"base", "other"}), (apart, {"other"})):
        sources = [Source("base", loads("base", base)), Source("other", loads("other", engine))]
        models = Models(sources, budget=2 * base.weight_bytes - matrices)

        async def test(models: Models = models, stays: set[str] = stays) -> None:
            for name in ("base", "other"):
                await models.served(name)
            assert {served.name for served in models.loaded()} == stays
            await models.close()

        asyncio.run(test())


def test_many_who_ask_at_once_load_a_model_once():
    sources = Sources("a")

    async def test(models: Models) -> None:
        found = await asyncio.gather(*(models.served("a") for _ in range(10)))
        assert len(set(map(id, found))) == 1 and sources.happened == ["load a"]

    run(sources, test)


def test_a_client_that_leaves_while_a_model_is_loaded_leaves_it_loaded():
    sources = Sources("a", "b")

    async def test(models: Models) -> None:
        asked = asyncio.ensure_future(models.served("a"))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await models.served("a")
        unloading = asyncio.ensure_future(models.unload("a"))
        while models.loaded():
            await asyncio.sleep(0)
        unloading.cancel()
        assert (await models.served("a")).thread.alive
        assert sources.happened == ["load a", "close a", "load a"]
        asyncio.ensure_future(models.served("b")).cancel()

    run(sources, test)


def test_a_model_that_cannot_be_loaded_says_so_to_its_owner_alone():
    sources = Sources("a", "broken")

    async def test(models: Models) -> None:
        for _ in range(2):
            with pytest.raises(ApiError) as caught:
                await models.served("broken")
            assert caught.value.status == 500 and "damaged" not in caught.value.message
            assert "damaged" in str(caught.value.__cause__)
        assert (await models.served("a")).thread.alive

    run(sources, test)


def test_a_model_that_comes_later_is_measured_too():
    sources = Sources("a")
    prepared: list[str] = []
    sources.models.prepare = lambda served: prepared.append(served.name)

    async def test(models: Models) -> None:
        await models.served("a")
        await models.unload("a")
        await models.served("a")
        assert prepared == ["a", "a"]

    run(sources, test)


def test_names_are_told_apart():
    with pytest.raises(ValueError, match="one name"):
        Sources("a", "a")


def test_the_namespace_tells_learned_states_apart():
    """A model that begins in another state shares no texts with the model as it is."""
    one, other = make_served(), make_served()
    assert one.namespace("", None) == other.namespace("", None)
    learned = make_served()
    tensors = learned.scheduler.empty.tensors
    next(iter(tensors.values())).data += 1
    assert learned.engine.fingerprint() == one.engine.fingerprint()
    assert learned.namespace("", None) != one.namespace("", None)
