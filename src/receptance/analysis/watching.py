"""Watching the calls inside a model, from outside and for a while.

A stand-in takes the place of a module or method among the attributes of the module that calls it,
shows arguments and results to those who watch, and makes way when the last of them leaves. So the
mathematics of a version holds nothing for the sake of analysis, and costs nothing without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from receptance.model.parts import Reading


class Watcher(Protocol):
    """Sees the calls of one attribute, and may change what goes in and comes out."""

    writes: bool

    def before(self, arguments: tuple[Any, ...], /) -> tuple[Any, ...]:
        """The arguments that the call shall get."""

    def after(self, result: Any, /) -> Any:
        """The result that the caller shall get."""


class _StandIn:
    """A call that is shown to watchers: those who write come first, so that readers see that."""

    def __init__(self, stands_for: Any) -> None:
        self.stands_for = stands_for
        self.watchers: list[Watcher] = []

    def __call__(self, *arguments: Any) -> Any:
        ordered = sorted(self.watchers, key=lambda watcher: not watcher.writes)
        for watcher in ordered:
            arguments = watcher.before(arguments)
        result = self.stands_for(*arguments)
        for watcher in ordered:
            result = watcher.after(result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stands_for, name)


class _TokenByToken:
    """The forward function of a block, called once for each token of a longer text.

    The law of the two forms makes that the same computation, in which the state after every token
    exists.
    """

    def __init__(self, forward: Callable[..., tuple[Any, ...]]) -> None:
        self.forward = forward
        self.watchers: list[object] = []

    def __call__(
        self, x: Tensor, state: Any, reading: Reading, dropout: float, *handed: Tensor
    ) -> tuple[Any, ...]:
        parts = []
        for t in range(x.shape[1]):
            now = slice(t, t + 1)
            resets, lengths = reading
            one = Reading(
                None if resets is None else resets[:, now],
                None if lengths is None else (lengths - t).clamp(0, 1),
            )
            out, state, *given = self.forward(
                x[:, now], state, one, dropout, *(part[:, now] for part in handed)
            )
            parts.append((out, *given))
        if not parts:
            return self.forward(x, state, reading, dropout, *handed)
        whole, *given = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
        return whole, state, *given


@contextmanager
def watching(owner: nn.Module, attribute: str, watcher: Watcher) -> Iterator[None]:
    """Show the calls of a module's attribute to a watcher inside a `with` block."""
    with _attended(owner, attribute, _StandIn, watcher):
        yield


@contextmanager
def token_by_token(block: nn.Module) -> Iterator[None]:
    """Run a block token by token inside a `with` block."""
    with _attended(block, "forward", _TokenByToken, object()):
        yield


@contextmanager
def _attended(owner: nn.Module, attribute: str, kind: type[Any], watcher: object) -> Iterator[None]:
    # The attributes of a module are changed in its __dict__, because torch refuses anything but a
    # module in the place of one. They are found there first, before its parameters and modules.
    before = owner.__dict__.get(attribute)
    stand_in = before if isinstance(before, kind) else kind(getattr(owner, attribute))
    owner.__dict__[attribute] = stand_in
    stand_in.watchers.append(watcher)
    try:
        yield
    finally:
        stand_in.watchers[:] = [other for other in stand_in.watchers if other is not watcher]
        if not stand_in.watchers and owner.__dict__.get(attribute) is stand_in:
            del owner.__dict__[attribute]
