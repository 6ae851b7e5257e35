"""Receptance on Ray: several servers behind one door, to which requests go by their beginning.

    serve run deploy.ray_app:build replicas=2 options="tiny-python --anyone"

`options` are those of `receptance serve`, without --host and --port, which are Ray's here. Each
server is a deployment of its own, so that the door knows them apart; Ray starts one that dies anew,
and meanwhile its requests go to the others.
"""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator

from ray import serve
from ray.exceptions import RayError

from receptance.apps.options import parse
from receptance.apps.serve import Options, make_app
from receptance.server.sticky import Asked, Backend, Sticky, Unreachable, in_process
from receptance.server.wire import Message

_MOST = 1024
"""Requests that a server is given at once; its own queue has the bounds that matter."""


class Server:
    """One server, which answers in the process of its replica."""

    def __init__(self, words: list[str]) -> None:
        self._app = make_app(parse(Options, words, "receptance serve"))
        self._ask, self._begun = in_process(self._app), False

    async def answer(self, asked: Asked) -> AsyncIterator[Message]:
        """The messages of an answer."""
        if not self._begun:
            self._begun = True
            self._app.begin()
        async for message in self._ask(asked):
            yield message


def remote(name: str) -> Backend:
    """A server of this name as the door asks it."""
    handle = serve.get_deployment_handle(name).options(stream=True, method_name="answer")

    async def ask(asked: Asked) -> AsyncIterator[Message]:
        answer = handle.remote(asked)
        try:
            async for message in answer:
                yield message
        except (RayError, TimeoutError) as error:
            raise Unreachable from error
        finally:
            answer.cancel()

    return ask


def build(args: dict[str, str]) -> serve.Application:
    """The application: a door, and servers behind it."""
    names = [f"server-{number}" for number in range(int(args.get("replicas", "2")))]
    words = [*shlex.split(args["options"]), "--quiet"]
    settings = {"max_ongoing_requests": _MOST, "graceful_shutdown_timeout_s": 30}
    servers = [serve.deployment(Server, name=name, **settings).bind(words) for name in names]

    def door() -> Sticky:
        return Sticky({name: remote(name) for name in names})

    entrance = serve.deployment(serve.ingress(door)(), name="door", max_ongoing_requests=_MOST)
    return entrance.bind(*servers)
