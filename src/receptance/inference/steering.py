"""What a request changes in the logits besides the sampler's options: biases and constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from receptance.inference.transfer import upload

# A bias may be this large in size, so that logits stay finite.
_LARGEST = 1e9


class Constraint(Protocol):
    """What one text may be, token by token."""

    def allowed(self) -> Tensor:
        """Which ids may come next: bool [N] on the CPU; ids from N on may not.

        It is asked once or more often for each place, and gives the same answer until `take`.
        """
        ...

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""
        ...


def checked_bias(bias: object) -> dict[int, float]:
    """A copy of the biases by token id; ValueError if an id or a bias is not a usable number."""
    if not isinstance(bias, Mapping):
        raise ValueError(f"bias is {bias!r}; it must map token ids to numbers")
    found = {}
    for token, value in bias.items():
        if not isinstance(token, SupportsIndex) or token.__index__() < 0:
            raise ValueError(f"bias names the token {token!r}; token ids are whole numbers")
        if not isinstance(value, SupportsFloat) or not abs(float(value)) <= _LARGEST:
            raise ValueError(f"the bias of token {token} is {value!r}; wanted a finite number")
        found[token.__index__()] = float(value)
    return found


def steer(
    logits: Tensor, biases: Sequence[Mapping[int, float]], constraints: Sequence[Constraint | None]
) -> None:
    """Add each row's biases to its logits [B,V], and rule out what its constraint does, in place.

    A bias of an id that the logits do not have has no effect.
    """
    size = logits.shape[1]
    for row, bias in enumerate(biases):
        if known := {token: value for token, value in bias.items() if token < size}:
            ids = upload(torch.tensor(list(known)), logits.device)
            logits[row, ids] += upload(torch.tensor(list(known.values())), logits.device)
    for row, constraint in enumerate(constraints):
        if constraint is not None:
            allowed = constraint.allowed()[:size]
            ruled_out = torch.ones(size, dtype=torch.bool)
            ruled_out[: len(allowed)] = ~allowed
            logits[row].masked_fill_(upload(ruled_out, logits.device), -torch.inf)


def likeliest(scores: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The ids with the largest of the scores [V], at most `count`, each with its score."""
    values, ids = scores.topk(min(count, len(scores)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
