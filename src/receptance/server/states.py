"""States that clients save under names, to go on from there later, or somewhere else."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from receptance.server.errors import ApiError, refusal
from receptance.server.serving import Served, new_id
from receptance.state import State

MOST_STATES = 1024
"""States of one owner."""


@dataclass(frozen=True)
class NamedState:
    """A state with its origin."""

    name: str
    model: str
    """The name of the model under which it was saved."""
    fingerprint: str
    """That of the engine, which decides where the state can be continued."""
    state: State
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: new_id("state-"))
    """Tells this state from all others, also from another one of its name."""


class NamedStates:
    """The states of all owners, none of whom sees those of others; in at most `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._states: dict[tuple[str, str], NamedState] = {}

    def all(self, owner: str) -> Iterator[NamedState]:
        """The states of an owner, the oldest first."""
        return (state for (own, _), state in self._states.items() if own == owner)

    def get(self, owner: str, name: str) -> NamedState:
        """A state; ApiError if there is none of this name."""
        if (found := self._states.get((owner, name))) is None:
            raise ApiError(404, f"there is no state {name!r}", param="state", code="not_found")
        return found

    def fitting(self, owner: str, name: str, served: Served) -> NamedState:
        """A state that a model can continue; ApiError if it is one of another model."""
        found = self.get(owner, name)
        if found.fingerprint != served.engine.fingerprint():
            raise ApiError(
                409,
                f"the state {name!r} was made by the model {found.model!r} and cannot be continued "
                f"by {served.name!r}",
                param="state",
                code="state_of_another_model",
            )
        return found

    def put(self, owner: str, named: NamedState) -> None:
        """Keep a state, in the place of an earlier one of its name."""
        check_name(named.name)
        others = {key: s for key, s in self._states.items() if key != (owner, named.name)}
        held = sum(s.state.nbytes for s in others.values())
        count = sum(own == owner for own, _ in others)
        if held + named.state.nbytes > self.budget or count >= MOST_STATES:
            raise ApiError(
                409, "there is no room for another state; delete one", code="no_room_for_states"
            )
        self._states = {**others, (owner, named.name): named}

    def delete(self, owner: str, name: str) -> None:
        """Forget a state."""
        self.get(owner, name)
        del self._states[owner, name]


def check_name(name: str) -> None:
    """ApiError if a name could not stand in a path."""
    plain = name.isascii() and name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if not plain or not 0 < len(name) <= 128 or name.startswith("."):
        raise refusal(
            "a state's name has 1 to 128 letters, digits, '-', '_' and '.', which is not the first",
            "name",
        )


def to_bytes(named: NamedState) -> bytes:
    """A state as a state file of this package."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        named.state.save(path, named.fingerprint)
        return path.read_bytes()


def from_bytes(content: bytes, name: str, served: Served) -> NamedState:
    """The state in a state file; ApiError if it is damaged, or one of another model."""
    fingerprint = served.engine.fingerprint()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        path.write_bytes(content)
        try:
            state = State.load(path, fingerprint)
        except ValueError as error:
            said = str(error).replace(str(path), "the body")
            status = 409 if "belongs to model" in said else 400
            raise ApiError(status, said, code="bad_state") from None
    if state.batch != 1:
        raise refusal(f"the state holds {state.batch} texts; wanted one")
    return NamedState(name, served.name, fingerprint, state)
