"""WKV-6 as matrix products over chunks of time, in plain torch: any device, any length, any decay.

A later position t of a chunk reads an earlier one, i, through the decays between them. Let m be a
border between the two, i <= m < t. Then

    r_t^T diag(w_{i+1} ... w_{t-1}) k_i = (r_t w_{m+1} ... w_{t-1})^T (w_{i+1} ... w_m k_i)

and both factors are at most r_t and k_i, however strong the decays are. A chunk is halved, and its
halves are, and so on down to single positions: every pair has one border in the middle of a piece
that separates it, and the pairs of all pieces of one size are one batched product. What comes from
before the chunk goes through the border at its start, and what leaves it through that at its end:

    Y = R S + (all pairs) V        S' = diag(w_1 ... w_n) S + K^T V

with R_t = r_t w_1 ... w_{t-1} and K_i = w_{i+1} ... w_n k_i. Only the step from S to S' is
sequential, and it is no product. docs/wkv6.md derives this and the gradient.

If an input is not finite, wkv6_serial takes over, token by token, because zero times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.ops import wkv6_serial
from receptance.ops.arguments import (
    Wkv6BackwardInputs,
    Wkv6Gradients,
    Wkv6Inputs,
    Wkv6Results,
)
from receptance.ops.wkv6_serial import CHUNK, kept_states

__all__ = ["CHUNK", "backward", "forward", "kept_states"]

# Half the pieces into which a chunk is cut.
HALVES = tuple(CHUNK >> n for n in range(1, CHUNK.bit_length()))
# Up to so many tokens take less time one by one.
FEW = 3
# The matrices of so many tokens are in memory at a time: about 20 times the inputs of these.
PIECE = 32 * CHUNK

_Arguments = TypeVar("_Arguments", Wkv6Inputs, Wkv6BackwardInputs)


def forward(
    x: Wkv6Inputs, products: Callable[[Wkv6Inputs], Wkv6Results] | None = None
) -> Wkv6Results:
    """Output [B,T,H,N], the state after the last token [B,H,N,N], chunk starts [K,B,H,N,N].

    products computes the matrix form of inputs whose padding is zero, by default in plain torch.
    """
    lengths, time = x.lengths, x.key.shape[1]
    x = without_padding(x)
    products = (products or _in_pieces) if _is_wide(x, x.state) else wkv6_serial.forward
    out, state, starts = products(x)
    if lengths is not None:
        out = out.masked_fill(~_within(lengths, time), 0)
    return out, state, starts


def backward(
    x: Wkv6BackwardInputs, products: Callable[[Wkv6BackwardInputs], Wkv6Gradients] | None = None
) -> Wkv6Gradients:
    """Gradients of the four inputs [B,T,H,N], of the bonus [H,N] and of the state [B,H,N,N].

    products computes those of the matrix form, as for `forward`.
    """
    lengths, time = x.lengths, x.key.shape[1]
    x = without_padding(x)
    products = (products or _back_in_pieces) if _is_wide(x, x.starts) else wkv6_serial.backward
    *grads, bonus, state = products(x)
    if lengths is not None:
        outside = ~_within(lengths, time)
        grads = [g.masked_fill(outside, 0) for g in grads]
    r, w, k, v = grads
    return r, w, k, v, bonus, state


def without_padding(x: _Arguments) -> _Arguments:
    """Put zeros where a row has ended: such a token neither fades the state nor adds to it."""
    if x.lengths is None:
        return x
    inside = _within(x.lengths, x.key.shape[1])
    names = [*Wkv6Inputs._fields[:4], *(n for n in ("grad_out",) if n in x._fields)]
    changes = {n: getattr(x, n).masked_fill(~inside, 0) for n in names}
    if x.resets is not None:
        changes["resets"] = x.resets & inside[..., 0, 0]
    return x._replace(**changes)


def _within(lengths: Tensor, time: int) -> Tensor:
    """Whether a position lies inside its row: [B] -> [B,T,1,1]."""
    return (torch.arange(time, device=lengths.device) < lengths[:, None])[..., None, None]


def _is_wide(x: Wkv6Inputs | Wkv6BackwardInputs, states: Tensor) -> bool:
    """Whether the matrix form is worth while, and all inputs are finite.

    On a GPU this waits for the inputs.
    """
    if x.key.shape[1] <= FEW or not x.key.numel():
        return False
    inputs = (x.receptance, x.log_decay, x.key, x.value, x.bonus, states)
    # A sum that overflows is not finite either, and then the exact way is taken without need.
    total = torch.stack([part.sum(dtype=torch.float32) for part in inputs]).sum()
    return bool(total.isfinite())


# ---- pieces of time -----------------------------------------------------------------------------


def _in_pieces(x: Wkv6Inputs) -> Wkv6Results:
    """The matrix form for one piece after another; padding is zero already."""
    state, outputs, starts = x.state, [], []
    for first in range(0, x.key.shape[1], PIECE):
        out, state, kept = _forward(_between(x, first)._replace(state=state))
        outputs.append(out)
        starts.append(kept)
    if len(outputs) == 1:
        return outputs[0], state, starts[0]
    return torch.cat(outputs, dim=1), state, torch.cat(starts)


def _back_in_pieces(x: Wkv6BackwardInputs) -> Wkv6Gradients:
    """The gradient of the matrix form, from the last piece to the first."""
    grad_state, grad_bonus, found = x.grad_state, torch.zeros_like(x.bonus), []
    for first in reversed(range(0, x.key.shape[1], PIECE)):
        kept = x.starts[first // CHUNK : (first + PIECE) // CHUNK]
        piece = _between(x, first)._replace(starts=kept, grad_state=grad_state)
        *grads, bonus, grad_state = _backward(piece)
        grad_bonus += bonus
        found.append(grads)
    r, w, k, v = (torch.cat(parts[::-1], dim=1) for parts in zip(*found, strict=True))
    return r, w, k, v, grad_bonus, grad_state


def _between(x: _Arguments, first: int) -> _Arguments:
    """The arguments with a piece of time that begins at a position, and without lengths."""
    fields = (*Wkv6Inputs._fields[:4], "resets", "grad_out")
    parts = {n: getattr(x, n, None) for n in fields}
    cut = {n: part[:, first : first + PIECE] for n, part in parts.items() if part is not None}
    return x._replace(lengths=None, **cut)


# ---- the matrix form ----------------------------------------------------------------------------


class _Chunks(NamedTuple):
    """The inputs in K chunks of n positions, in the dtype of the state; zeros fill up the last."""

    r: Tensor  # [K,B,H,n,N], as the next three
    log_decay: Tensor
    k: Tensor
    v: Tensor
    bonus: Tensor  # [H,1,N]
    # The number of the document inside the chunk to which a position belongs; None where nothing is
    # ever reset.
    document: Tensor | None  # [K,B,1,n,1]


class _Pairs(NamedTuple):
    """Pairs of a later position and an earlier one, with a border between the two.

    There are P pieces of h later positions and as many earlier ones; what is [...] are the axes of
    chunks, rows, heads and pieces.
    """

    r: Tensor  # [...,h,N], faded from the border to the position
    k: Tensor  # [...,h,N], faded from the position to the border
    ahead: Tensor  # the factors of these two
    behind: Tensor
    weights: Tensor  # [...,h,h]: how much the later position reads of the earlier one


class _Borders(NamedTuple):
    """How a chunk meets the states before and after it."""

    r: Tensor  # R [K,B,H,n,N]; zero in positions behind a reset
    k: Tensor  # K; zero in positions that a reset follows
    ahead: Tensor  # the factors of these two, which are zero there as well
    behind: Tensor
    keep: Tensor  # [K,B,H,N,1]: what the chunk leaves of the state before it


def _forward(x: Wkv6Inputs) -> Wkv6Results:
    c = _cut(x, x.state.dtype)
    out = (c.r * c.bonus * c.k).sum(-1, keepdim=True) * c.v
    for half in HALVES:
        _later(out, half).add_(_pairs(c, half).weights @ _earlier(c.v, half))
    b = _borders(c)
    states = torch.cat((x.state[None], b.k.mT @ c.v))
    for n in range(len(b.keep)):
        states[n + 1].addcmul_(states[n], b.keep[n])
    starts = states[:-1]
    out += b.r @ starts
    return _join(out, x.key.shape[1]).to(x.value.dtype), states[-1].clone(), starts


def _backward(x: Wkv6BackwardInputs) -> Wkv6Gradients:
    """The gradients of _forward.

    A factor e^g gives g the product of what it multiplies with the gradient of that, and g is the
    sum of log_decay between a position and a border. So all terms of a gradient of log_decay are
    added, and none is a difference.
    """
    c, grad_out = _cut(x, x.starts.dtype), _split(x.grad_out.to(x.starts.dtype))
    along = (grad_out * c.v).sum(-1, keepdim=True)
    bonus = (along * c.r * c.k).sum((0, 1, 3))
    r, k = along * c.bonus * c.k, along * c.bonus * c.r
    v, log_decay = (c.r * c.bonus * c.k).sum(-1, keepdim=True) * grad_out, torch.zeros_like(r)
    for half in HALVES:
        p, grad = _pairs(c, half), _later(grad_out, half)
        weights = _seen(c, half, grad @ _earlier(c.v, half).mT)
        _earlier(v, half).add_(p.weights.mT @ grad)
        of_r, of_k = weights @ p.k, weights.mT @ p.r
        _later(r, half).addcmul_(of_r, p.ahead)
        _earlier(k, half).addcmul_(of_k, p.behind)
        _later(log_decay, half).add_(_after(of_r * p.r))
        _earlier(log_decay, half).add_(_before(of_k * p.k))

    b = _borders(c)
    states = torch.cat((b.r.mT @ grad_out, x.grad_state[None]))
    for n in reversed(range(len(b.keep))):
        states[n].addcmul_(states[n + 1], b.keep[n])
    ends = states[1:]
    of_r, of_k = grad_out @ x.starts.mT, c.v @ ends.mT
    r.addcmul_(of_r, b.ahead)
    k.addcmul_(of_k, b.behind)
    v += b.k @ ends
    log_decay += _after(of_r * b.r) + _before(of_k * b.k)
    log_decay += ((ends * x.starts).sum(-1, keepdim=True) * b.keep).mT

    time, inputs = x.key.shape[1], x[2:6]
    found = zip((r, log_decay, k, v), inputs, strict=True)
    r, log_decay, k, v = (_join(part, time).to(like.dtype) for part, like in found)
    return r, log_decay, k, v, bonus, states[0].clone()


def _pairs(c: _Chunks, half: int) -> _Pairs:
    """The pairs with a border in the middle of the pieces of 2 * half positions."""
    ahead, behind = _fades(_later(c.log_decay, half), _earlier(c.log_decay, half))
    r, k = _later(c.r, half) * ahead, _earlier(c.k, half) * behind
    return _Pairs(r, k, ahead, behind, _seen(c, half, r @ k.mT))


def _borders(c: _Chunks) -> _Borders:
    ahead, behind = _fades(c.log_decay, c.log_decay)
    keep = c.log_decay.sum(-2).exp()[..., None]
    if c.document is not None:
        last = c.document[..., -1:, :]
        ahead, behind = ahead * (c.document == 0), behind * (c.document == last)
        keep = keep * (last == 0)
    return _Borders(c.r * ahead, c.k * behind, ahead, behind, keep)


def _fades(later: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """The decay from a border to each later position, and from each earlier one to the border.

    A token's own decay acts after the token is read and before it is stored.
    """
    return _before(later).exp_(), _after(earlier).exp_()


def _seen(c: _Chunks, half: int, products: Tensor) -> Tensor:
    """Zero in the pairs [...,h,h] of positions from different documents."""
    if c.document is None:
        return products
    return products.mul_(_later(c.document, half) == _earlier(c.document, half).mT)


def _cut(x: Wkv6Inputs | Wkv6BackwardInputs, dtype: torch.dtype) -> _Chunks:
    parts = (x.receptance, x.log_decay, x.key, x.value)
    r, log_decay, k, v = (_split(part.to(dtype)) for part in parts)
    document = None
    if x.resets is not None:
        document = _split(x.resets[..., None, None].to(dtype)).cumsum(-2)
    return _Chunks(r, log_decay, k, v, x.bonus[:, None], document)


def _earlier(x: Tensor, half: int) -> Tensor:
    """A view of the first half of every piece: [...,n,N] -> [...,P,half,N]."""
    pieces: Tensor = x.unflatten(-2, (-1, 2, half))
    return pieces[..., 0, :, :]


def _later(x: Tensor, half: int) -> Tensor:
    """A view of the second half of every piece: [...,n,N] -> [...,P,half,N]."""
    pieces: Tensor = x.unflatten(-2, (-1, 2, half))
    return pieces[..., 1, :, :]


def _before(x: Tensor) -> Tensor:
    """The sum over all earlier positions of the piece: [...,n,N] -> [...,n,N]."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _after(x: Tensor) -> Tensor:
    """The sum over all later positions of the piece: [...,n,N] -> [...,n,N]."""
    return _before(x.flip(-2)).flip(-2)


def _split(x: Tensor) -> Tensor:
    """Cut time into chunks, the last filled up with zeros: [B,T,H,N] -> [K,B,H,n,N]."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK)).contiguous()
    return x.view(x.shape[0], -1, CHUNK, *x.shape[2:]).permute(1, 0, 3, 2, 4).contiguous()


def _join(x: Tensor, time: int) -> Tensor:
    """The inverse of _split, without what fills up the last chunk."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :time].contiguous()
