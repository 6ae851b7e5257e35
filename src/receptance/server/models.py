"""`Models`: the models that a server has, loaded when they are asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from receptance.engine.base import Engine
from receptance.engine.native import NativeEngine
from receptance.server.api.options import TextOptions
from receptance.server.errors import ApiError, refusal
from receptance.server.grammar import Grammars
from receptance.server.limits import Limits
from receptance.server.serving import Group, Served
from receptance.server.states import NamedState, NamedStates, check_name
from receptance.state import State

Result = TypeVar("Result")

_STATES = 1 << 30
"""Bytes of all named states."""


@dataclass
class Source:
    """A model that can be loaded."""

    name: str
    load: Callable[[], Served]
    """Loads the model; it is called in a thread of its own."""
    created: int = field(default_factory=lambda: int(time.time()))
    served: Served | None = None
    used: float = 0
    """When it was last asked for, by the clock of the event loop."""
    weight_bytes: int = 0
    """The bytes that it added to the weights in memory when it was last loaded."""


class Models:
    """The models of a server, by name; those that are not in use may be unloaded for others.

    `budget` bounds the bytes of weights that are loaded at once; None loads whatever is asked for.
    One event loop uses it.
    """

    def __init__(
        self, sources: Sequence[Source], limits: Limits | None = None, budget: int | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.sources = {source.name: source for source in sources}
        if len(self.sources) != len(sources):
            raise ValueError("two models have one name; give each a name of its own")
        self.states = NamedStates(_STATES)
        self.prepare: Callable[[Served], None] = lambda served: None
        """Is called with every model before it starts."""
        self._budget = budget
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._grammars: dict[str, Grammars] = {}

    def loaded(self) -> list[Served]:
        """The models that are in memory."""
        return [source.served for source in self.sources.values() if source.served is not None]

    def source(self, name: str) -> Source:
        """A model that may not be loaded; ApiError if there is none of this name."""
        if (source := self.sources.get(name)) is None:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}; there are {', '.join(self.sources)}",
                param="model",
                code="model_not_found",
            )
        return source

    async def served(self, name: str) -> Served:
        """A model, which is loaded if it is not; ApiError if there is none of this name."""
        source = self.source(name)
        source.used = asyncio.get_running_loop().time()
        if source.served is not None:
            return source.served
        return await self._to_the_end(self._load(source))

    async def unload(self, name: str) -> bool:
        """Free a model's memory; False if it is in use or not loaded."""
        return await self._to_the_end(self._unload(self.source(name)))

    async def _to_the_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Load or unload, one after another, also if the client leaves that asked for it."""

        async def alone() -> Result:
            async with self._lock:
                return await work

        task = asyncio.ensure_future(alone())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _load(self, source: Source) -> Served:
        if source.served is not None:
            return source.served
        await self._make_room(lambda loaded: weight_bytes(loaded) + source.weight_bytes)
        try:
            served = await asyncio.to_thread(source.load)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            raise ApiError(500, f"the model {source.name!r} could not be loaded") from error
        others = [other.engine for other in self.loaded()]
        source.weight_bytes = weight_bytes([*others, served.engine]) - weight_bytes(others)
        try:
            await self._make_room(lambda loaded: weight_bytes([*loaded, served.engine]))
        except ApiError:
            await asyncio.to_thread(served.stop)
            raise
        self.prepare(served)
        served.start()
        source.served = served
        return served

    async def _unload(self, source: Source) -> bool:
        served = source.served
        if served is None or served.busy:
            return False
        source.served = None
        self._grammars.pop(source.name, None)
        await asyncio.to_thread(served.stop)
        return True

    async def _make_room(self, needed: Callable[[list[Engine]], int]) -> None:
        """Unload models that nobody uses, the one asked for longest ago first.

        `needed` tells the bytes of all weights if the given engines stay.
        """
        if self._budget is None:
            return
        if needed([]) > self._budget:
            raise ApiError(503, "there is no memory for this model", code="no_memory")
        while needed([served.engine for served in self.loaded()]) > self._budget:
            idle = [s for s in self.sources.values() if s.served and not s.served.busy]
            if not idle or not await self._unload(min(idle, key=lambda s: s.used)):
                raise ApiError(
                    503, "there is no memory for this model now", code="no_memory", retry_after=10
                )

    async def close(self) -> None:
        """Stop all models."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for served in self.loaded():
            await asyncio.to_thread(served.stop)

    # ---- what requests need of a model --------------------------------------------------------

    def grammars(self, served: Served) -> Grammars:
        """The grammars of a model's tokenizer."""
        if served.name not in self._grammars:
            self._grammars[served.name] = Grammars(served.tokenizer)
        return self._grammars[served.name]

    def beginning(self, owner: str, served: Served, options: TextOptions) -> Beginning:
        """Where a request's prompt begins: from nothing, or from a named state."""
        if options.save_state is not None:
            check_name(options.save_state)
            if (options.n or 1) > 1:
                raise refusal("save_state is for one answer, and n asks for more", "save_state")
        named = None
        if options.state is not None:
            named = self.states.fitting(owner, options.state, served)
        namespace = served.namespace(owner, options.cache_salt, named.key if named else "")
        return Beginning(self, owner, served, namespace, named, options.save_state)


def weight_bytes(engines: Iterable[Engine]) -> int:
    """The bytes of the engines' weights; matrices that several share are counted once."""
    own, matrices = 0, dict[int, int]()
    for engine in engines:
        packed = engine.packed.values() if isinstance(engine, NativeEngine) else ()
        own += engine.weight_bytes - sum(m.nbytes for m in packed)
        matrices |= {id(m.data): m.nbytes for m in packed}
    return own + sum(matrices.values())


@dataclass(frozen=True)
class Beginning:
    """Where a prompt begins, and where the state behind the answer goes."""

    models: Models
    client: str
    served: Served
    namespace: str
    named: NamedState | None
    save_as: str | None

    @property
    def state(self) -> State | None:
        """The state in which the prompt begins; None for one that has read nothing."""
        return self.named.state if self.named is not None else None

    def save(self, group: Group) -> None:
        """Keep the state behind the answer if the request wants that."""
        state = next(iter(group.states.values()), None)
        if self.save_as is not None and state is not None:
            served = self.served
            named = NamedState(self.save_as, served.name, served.engine.fingerprint(), state)
            self.models.states.put(self.client, named)
