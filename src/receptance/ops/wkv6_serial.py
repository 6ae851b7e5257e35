"""WKV-6 one token after another, with its gradient by hand: for a few tokens and for any inputs.

Unlike wkv6_reference, which autograd differentiates, this keeps one state for every CHUNK tokens
and recomputes the others. A reset wipes even a state of NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.ops.arguments import (
    Wkv6BackwardInputs,
    Wkv6Gradients,
    Wkv6Inputs,
    Wkv6Results,
)

CHUNK = 32

Token = tuple[Tensor, Tensor, Tensor, Tensor]
"""The four inputs at one position, each [B,H,N]; the second is the decay itself."""


def kept_states(time: int) -> int:
    """How many states forward keeps: one before every chunk."""
    return -(-time // CHUNK)


def forward(x: Wkv6Inputs) -> Wkv6Results:
    """Output [B,T,H,N], the state after the last token [B,H,N,N], chunk starts [K,B,H,N,N].

    Inputs beyond a row's length are zero (see wkv6_chunked.without_padding).
    """
    state, outputs, starts = x.state, [], []
    for t, token in enumerate(_tokens(x)):
        if t % CHUNK == 0:
            starts.append(state)
        receptance, _, key, value = token
        state = _forget(state, x.resets, t)
        own = (receptance * x.bonus * key).sum(-1, keepdim=True)
        outputs.append(_times(state.mT, receptance) + own * value)
        state = _step(state, token)
    out = torch.stack(outputs, dim=1).to(x.value.dtype) if outputs else torch.empty_like(x.value)
    kept = torch.stack(starts) if starts else x.state.new_empty(0, *x.state.shape)
    return out, state.clone(), kept


def backward(x: Wkv6BackwardInputs) -> Wkv6Gradients:
    """Gradients of the four inputs [B,T,H,N], of the bonus [H,N] and of the state [B,H,N,N].

    Inputs and grad_out beyond a row's length are zero.
    """
    tokens, grad_out = _tokens(x), x.grad_out.to(x.starts.dtype)
    grad_state, bonus, grads = x.grad_state.clone(), torch.zeros_like(x.bonus), []
    for n in reversed(range(kept_states(len(tokens)))):
        first, last = n * CHUNK, min((n + 1) * CHUNK, len(tokens))
        states = _replay(x, tokens[first:last], first, x.starts[n])
        for t in reversed(range(first, last)):
            before, token, grad = states[t - first], tokens[t], grad_out[:, t]
            found, of_bonus = _step_back(before, token, x.bonus, grad, grad_state)
            carried = grad_state * token[1][..., None] + token[0][..., None] * grad[..., None, :]
            grad_state = _forget(carried, x.resets, t)
            bonus += of_bonus
            grads.append(found)
    inputs = x[2:6]
    if not grads:
        r, w, k, v = map(torch.zeros_like, inputs)
        return r, w, k, v, bonus, grad_state
    parts = (torch.stack(part[::-1], dim=1) for part in zip(*grads, strict=True))
    r, w, k, v = (g.to(like.dtype) for g, like in zip(parts, inputs, strict=True))
    return r, w, k, v, bonus, grad_state


def _tokens(x: Wkv6Inputs | Wkv6BackwardInputs) -> list[Token]:
    """The inputs of every position, in the dtype of the state."""
    decay = x.log_decay.exp()
    parts = (x.receptance, decay, x.key, x.value)
    return list(zip(*(part.to(decay.dtype).unbind(1) for part in parts), strict=True))


def _step(state: Tensor, token: Token) -> Tensor:
    """The state after a token [B,H,N,N]."""
    _, decay, key, value = token
    return torch.addcmul(state * decay[..., None], key[..., None], value[..., None, :])


def _replay(x: Wkv6BackwardInputs, tokens: list[Token], first: int, state: Tensor) -> list[Tensor]:
    """For each token the state before it."""
    states = []
    for t, token in enumerate(tokens, first):
        states.append(_forget(state, x.resets, t))
        state = _step(states[-1], token)
    return states


def _step_back(
    before: Tensor, token: Token, bonus: Tensor, grad_out: Tensor, grad: Tensor
) -> tuple[Token, Tensor]:
    """The gradients of a token's inputs and of the bonus; `grad` is of the state after it."""
    receptance, decay, key, value = token
    along = (value * grad_out).sum(-1, keepdim=True)
    own = (receptance * bonus * key).sum(-1, keepdim=True)
    found = (
        _times(before, grad_out) + along * bonus * key,
        (grad * before).sum(-1) * decay,
        _times(grad, value) + along * bonus * receptance,
        _times(grad.mT, key) + own * grad_out,
    )
    return found, (along * receptance * key).sum(0)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """[B,H,N,N], [B,H,N] -> [B,H,N]."""
    return (matrix @ vector[..., None])[..., 0]


def _forget(state: Tensor, resets: Tensor | None, t: int) -> Tensor:
    """The state, or zero in the rows that begin afresh at position t."""
    return state if resets is None else state.masked_fill(resets[:, t, None, None, None], 0)
