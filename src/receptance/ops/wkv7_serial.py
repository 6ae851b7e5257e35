"""WKV-7 one token after another, with its gradient by hand: for a few tokens and for any inputs.

Unlike wkv7_reference, which autograd differentiates, this keeps one state for every CHUNK tokens
and recomputes the others. It divides by nothing and its factors are at most 1, so it has no limits:
decays may be 0, and a reset wipes even a state of NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.ops.arguments import (
    Wkv7BackwardInputs,
    Wkv7Gradients,
    Wkv7Inputs,
    Wkv7Results,
)

CHUNK = 16

Token = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The six inputs at one position, each [B,H,N]; the second is the decay itself."""


def kept_states(time: int) -> int:
    """How many states forward keeps: one before every chunk."""
    return -(-time // CHUNK)


def forward(x: Wkv7Inputs) -> Wkv7Results:
    """Output [B,T,H,N], the state after the last token [B,H,N,N], chunk starts [K,B,H,N,N].

    Inputs beyond a row's length are zero (see wkv7_chunked.without_padding).
    """
    state, outputs, starts = x.state, [], []
    for t, token in enumerate(_tokens(x)):
        if t % CHUNK == 0:
            starts.append(state)
        state, _ = _step(_forget(state, x.resets, t), token)
        outputs.append(_times(state, token[0]))
    out = torch.stack(outputs, dim=1).to(x.value.dtype) if outputs else torch.empty_like(x.value)
    kept = torch.stack(starts) if starts else _no_states(x.state)
    return out, state.clone(), kept


def backward(x: Wkv7BackwardInputs) -> Wkv7Gradients:
    """Gradients of the six inputs [B,T,H,N] and of the state [B,H,N,N].

    Inputs and grad_out beyond a row's length are zero.
    """
    tokens, grad_out = _tokens(x), x.grad_out.to(x.starts.dtype)
    grad_state, grads = x.grad_state.clone(), []
    for n in reversed(range(kept_states(len(tokens)))):
        first, last = n * CHUNK, min((n + 1) * CHUNK, len(tokens))
        states = _replay(x, tokens[first:last], first, x.starts[n])
        for t in reversed(range(first, last)):
            before, after, removed = states[t - first]
            found, grad_state = _step_back(
                before, after, removed, tokens[t], grad_out[:, t], grad_state
            )
            grad_state = _forget(grad_state, x.resets, t)
            grads.append(found)
    inputs = x[2:8]
    if not grads:
        r, w, k, v, a, b = map(torch.zeros_like, inputs)
        return r, w, k, v, a, b, grad_state
    parts = (torch.stack(part[::-1], dim=1) for part in zip(*grads, strict=True))
    r, w, k, v, a, b = (g.to(like.dtype) for g, like in zip(parts, inputs, strict=True))
    return r, w, k, v, a, b, grad_state


def _tokens(x: Wkv7Inputs | Wkv7BackwardInputs) -> list[Token]:
    """The inputs of every position, in the dtype of the state."""
    decay = x.log_decay.exp()
    parts = (x.receptance, decay, x.key, x.value, x.removal, x.replacement)
    return list(zip(*(part.to(decay.dtype).unbind(1) for part in parts), strict=True))


def _step(state: Tensor, token: Token) -> tuple[Tensor, Tensor]:
    """The state after a token [B,H,N,N], and what its removal read from the one before [B,H,N]."""
    _, decay, key, value, removal, replacement = token
    removed = _times(state, removal)
    # One product of [N,2] and [2,N] for what is put back and what is new.
    columns, rows = torch.stack((removed, value), -1), torch.stack((replacement, key), -2)
    return state * decay[..., None, :] + columns @ rows, removed


def _replay(
    x: Wkv7BackwardInputs, tokens: list[Token], first: int, state: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each token the state before it, the state after it, and what the removal read."""
    states = []
    for t, token in enumerate(tokens, first):
        before = _forget(state, x.resets, t)
        state, removed = _step(before, token)
        states.append((before, state, removed))
    return states


def _step_back(
    before: Tensor, after: Tensor, removed: Tensor, token: Token, grad_out: Tensor, grad: Tensor
) -> tuple[Token, Tensor]:
    """The gradients of a token's inputs, and of the state before it; `grad` is of that after it."""
    receptance, decay, key, value, removal, replacement = token
    grad = grad + grad_out[..., :, None] * receptance[..., None, :]
    grad_removed = _times(grad, replacement)
    found = (
        _times(after.mT, grad_out),
        (grad * before).sum(-2) * decay,
        _times(grad.mT, value),
        _times(grad, key),
        _times(before.mT, grad_removed),
        _times(grad.mT, removed),
    )
    grad = grad * decay[..., None, :] + grad_removed[..., :, None] * removal[..., None, :]
    return found, grad


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """[B,H,N,N], [B,H,N] -> [B,H,N]."""
    return (matrix @ vector[..., None])[..., 0]


def _forget(state: Tensor, resets: Tensor | None, t: int) -> Tensor:
    """The state, or zero in the rows that begin afresh at position t."""
    return state if resets is None else state.masked_fill(resets[:, t, None, None, None], 0)


def _no_states(state: Tensor) -> Tensor:
    return state.new_empty(0, *state.shape)
