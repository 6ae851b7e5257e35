"""How pieces of several texts go through an engine: in one ragged call, or each row alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from receptance.engine.base import Engine
from receptance.inference.transfer import upload
from receptance.state import State


def padded(pieces: Sequence[Tensor]) -> tuple[Tensor, list[int] | None]:
    """Pieces of any lengths as one [B,T], and the lengths if they are not the same."""
    sizes = [len(piece) for piece in pieces]
    if min(sizes) == max(sizes):
        return torch.stack(list(pieces)), None
    return pad_sequence(list(pieces), batch_first=True), sizes


def read(
    engine: Engine, tokens: Tensor, sizes: Sequence[int] | None, state: State | None
) -> tuple[Tensor, State]:
    """Go on with texts, each by at least one token: features of the last ones [B,C], the state.

    tokens are int64 [B,T] on the CPU, of which sizes [B] (None: all) are real; state None: rows
    that have read nothing.
    """
    device = engine.device
    if sizes is None:
        features, state = engine.features(upload(tokens, device), state)
        return features[:, -1], state
    lengths = upload(torch.tensor(sizes), device)
    features, state = engine.features(upload(tokens, device), state, lengths=lengths)
    return features[torch.arange(len(tokens), device=device), lengths - 1], state


def read_apart(
    engine: Engine, tokens: Tensor, sizes: Sequence[int] | None, state: State | None
) -> tuple[Tensor, State]:
    """The same with a call for each row, so that no row depends on another, to the bit."""
    features, states = [], []
    for row, piece in enumerate(tokens.split(1)):
        own = piece if sizes is None else piece[:, : sizes[row]]
        before = None if state is None else state.rows(row)
        last, after = read(engine, own, None, before)
        features.append(last)
        states.append(after)
    return torch.cat(features), State.cat(states)


def head_apart(engine: Engine, features: Tensor) -> Tensor:
    """Logits with a call for each row: [B,C] -> [B,V]."""
    # A copy begins at an aligned address; some kernels round by that.
    return torch.cat([engine.head(row.clone()) for row in features.split(1)])


def empty_state(engine: Engine) -> State:
    """One row that has read nothing: by the law, what none of one token leaves."""
    none = torch.zeros(1, dtype=torch.int64, device=engine.device)
    return engine.features(none[None], lengths=none)[1]
