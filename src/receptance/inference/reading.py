"""How pieces of several texts go through an engine: in one ragged call, or each row alone."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from receptance.engine.base import Engine
from receptance.inference.transfer import upload
from receptance.model.inputs import check_ids
from receptance.state import State

_WANTED = "a prompt is a text or a list of token ids"


def check_weights(engine: Engine) -> None:
    """ValueError if the engine is a model that was built without memory for its weights."""
    if engine.device.type == "meta":
        raise ValueError(
            "the model has no weights: it is on the meta device; load weights, or build it on a "
            "real device"
        )


def token_ids(ids: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """A copy of a prompt's ids as int64 [T] on the CPU; ValueError if they are not token ids."""
    try:
        tokens = torch.as_tensor(ids) if len(ids) else torch.empty(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{_WANTED}; found {reprlib.repr(ids)}") from error
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"{_WANTED}; found {tokens.dtype} {list(tokens.shape)}")
    tokens = tokens.to("cpu", torch.int64, copy=True)
    check_ids(tokens, vocab_size)
    return tokens


def padded(pieces: Sequence[Tensor]) -> tuple[Tensor, list[int] | None]:
    """Pieces of any lengths as one [B,T], and their lengths if these differ."""
    sizes = [len(piece) for piece in pieces]
    if min(sizes) == max(sizes):
        return torch.stack(list(pieces)), None
    return pad_sequence(list(pieces), batch_first=True), sizes


def read(
    engine: Engine, tokens: Tensor, sizes: Sequence[int] | None, state: State | None
) -> tuple[Tensor, State]:
    """Read on in several texts: the features at each one's last token [B,C], and the new state.

    `tokens` are int64 [B,T] on the CPU, of which the first `sizes` [B] of each row (None: all) are
    real. A row of size 0 keeps its state, and its features mean nothing. A `state` of None stands
    for rows that have read nothing. A model in training mode reads without dropout.
    """
    device = engine.device
    with engine.evaluating():
        if sizes is None:
            features, state = engine.features(upload(tokens, device), state)
            return features[:, -1], state
        lengths = upload(torch.tensor(sizes), device)
        features, state = engine.features(upload(tokens, device), state, lengths=lengths)
    return features[torch.arange(len(tokens), device=device), lengths - 1], state


def read_apart(
    engine: Engine, tokens: Tensor, sizes: Sequence[int] | None, state: State | None
) -> tuple[Tensor, State]:
    """The same with one call per row, so that no bit of a row depends on the other rows.

    Here every row has to read at least one token.
    """
    features, states = [], []
    for row, piece in enumerate(tokens.split(1)):
        own = piece if sizes is None else piece[:, : sizes[row]]
        before = None if state is None else state.rows(row)
        last, after = read(engine, own, None, before)
        features.append(last)
        states.append(after)
    return torch.cat(features), State.cat(states)


def head_apart(engine: Engine, features: Tensor) -> Tensor:
    """Logits with one call per row: [B,C] -> [B,V]."""
    # The copy begins at an aligned address; some kernels round differently at other addresses.
    return torch.cat([engine.head(row.clone()) for row in features.split(1)])


def empty_state(engine: Engine) -> State:
    """The state of one row that has read nothing, obtained by reading one token with length 0.

    So this works for every engine, also for one whose rows begin in a learned state.
    """
    none = torch.zeros(1, dtype=torch.int64, device=engine.device)
    with engine.evaluating():
        return engine.features(none[None], lengths=none)[1]
