"""/v1/states: states that are saved under names."""

from __future__ import annotations

import msgspec

from receptance.server.calls import Call, Reply, reply
from receptance.server.states import NamedState, check_name, from_bytes, to_bytes

MEDIA_TYPE = "application/vnd.receptance.state"


class StateInfo(msgspec.Struct):
    """A saved state."""

    id: str
    model: str
    created: int
    tokens: int
    """How many tokens it has read."""
    bytes: int
    object: str = "state"


class StateList(msgspec.Struct):
    """All states of an owner."""

    data: list[StateInfo]
    object: str = "list"


class ForkRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A second name for a state."""

    name: str


def _info(named: NamedState) -> StateInfo:
    tokens = int(named.state.tokens[0])
    return StateInfo(named.name, named.model, named.created, tokens, named.state.nbytes)


async def states(call: Call) -> Reply:
    """All states of the owner."""
    return reply(StateList([_info(named) for named in call.models.states.all(call.owner)]))


async def state(call: Call) -> Reply:
    """What is known of a state."""
    return reply(_info(call.models.states.get(call.owner, call.path["name"])))


async def download(call: Call) -> Reply:
    """A state as a file."""
    named = call.models.states.get(call.owner, call.path["name"])
    return Reply(to_bytes(named), MEDIA_TYPE)


async def upload(call: Call) -> Reply:
    """Keep the state in a file, for the model that the query names or else the first one."""
    check_name(call.path["name"])
    name = call.query.get("model") or next(iter(call.models.sources))
    served = await call.models.served(name)
    named = from_bytes(call.body, call.path["name"], served)
    call.models.states.put(call.owner, named)
    return reply(_info(named), 201)


async def fork(call: Call) -> Reply:
    """Keep a state under a second name; the two go on without each other."""
    request = call.decode(ForkRequest)
    named = call.models.states.get(call.owner, call.path["name"])
    other = NamedState(request.name, named.model, named.fingerprint, named.state)
    call.models.states.put(call.owner, other)
    return reply(_info(other), 201)


async def delete(call: Call) -> Reply:
    """Forget a state."""
    call.models.states.delete(call.owner, call.path["name"])
    return reply({"id": call.path["name"], "object": "state", "deleted": True})
