"""WKV-7 as matrix products over chunks of time, in plain torch: any device, any length.

For a chunk that begins with the state S, let g_t be the sum of log_decay up to position t of the
chunk, and let matrices have one row for each position:

    R_t = r_t e^{g_t}    A_t = a_t e^{g_{t-1}}    B_i = b_i e^{-g_i}    K_i = k_i e^{-g_i}

The vectors u_t = S_{t-1} a_t that the removals read from the state solve a unit lower-triangular
system, and everything else follows from them:

    (I - stril(A B^T)) U = A S^T + stril(A K^T) V
    Y = R S^T + tril(R B^T) U + tril(R K^T) V
    S' = (S + U^T B + V^T K) diag(e^{g_n})

Only the step from S to S' is sequential: a loop over chunks with two products in each round. All
the rest is done for all chunks at once. docs/wkv7.md derives this and the gradient.

e^{-g} grows with the length of a chunk. Where a decay is too strong for that, or an input is not
finite, wkv7_serial takes over, token by token; the decays of the model are always mild enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.ops import wkv7_serial
from receptance.ops.arguments import (
    Wkv7BackwardInputs,
    Wkv7Gradients,
    Wkv7Inputs,
    Wkv7Results,
)
from receptance.ops.wkv7_serial import CHUNK, kept_states

__all__ = ["CHUNK", "STRONGEST", "backward", "forward", "kept_states"]

# The largest |log_decay| of the matrix form. e^{-g} then stays below e^32, and float32 would allow
# e^88; but the gradient of log_decay is a difference, which loses digits as decays grow.
STRONGEST = 32 / CHUNK
# Up to so many tokens take less time one by one.
FEW = 3
# The matrices of so many tokens are in memory at a time: about 20 times the inputs of these.
PIECE = 64 * CHUNK

_Arguments = TypeVar("_Arguments", Wkv7Inputs, Wkv7BackwardInputs)


def forward(
    x: Wkv7Inputs, products: Callable[[Wkv7Inputs], Wkv7Results] | None = None
) -> Wkv7Results:
    """Output [B,T,H,N], the state after the last token [B,H,N,N], chunk starts [K,B,H,N,N].

    products computes the matrix form of inputs whose padding is zero, by default in plain torch.
    """
    lengths, time = x.lengths, x.key.shape[1]
    x = without_padding(x)
    products = (products or _in_pieces) if _is_wide(x, x.state) else wkv7_serial.forward
    out, state, starts = products(x)
    if lengths is not None:
        out = out.masked_fill(~_within(lengths, time), 0)
    return out, state, starts


def backward(
    x: Wkv7BackwardInputs, products: Callable[[Wkv7BackwardInputs], Wkv7Gradients] | None = None
) -> Wkv7Gradients:
    """Gradients of the six inputs [B,T,H,N] and of the state [B,H,N,N].

    products computes those of the matrix form, as for `forward`.
    """
    lengths, time = x.lengths, x.key.shape[1]
    x = without_padding(x)
    products = (products or _back_in_pieces) if _is_wide(x, x.starts) else wkv7_serial.backward
    *grads, state = products(x)
    if lengths is not None:
        outside = ~_within(lengths, time)
        grads = [g.masked_fill(outside, 0) for g in grads]
    r, w, k, v, a, b = grads
    return r, w, k, v, a, b, state


def without_padding(x: _Arguments) -> _Arguments:
    """Put zeros where a row has ended: such a token neither fades the state nor adds to it."""
    if x.lengths is None:
        return x
    inside = _within(x.lengths, x.key.shape[1])
    names = [*Wkv7Inputs._fields[:6], *(n for n in ("grad_out",) if n in x._fields)]
    changes = {n: getattr(x, n).masked_fill(~inside, 0) for n in names}
    if x.resets is not None:
        changes["resets"] = x.resets & inside[..., 0, 0]
    return x._replace(**changes)


def _within(lengths: Tensor, time: int) -> Tensor:
    """Whether a position lies inside its row: [B] -> [B,T,1,1]."""
    return (torch.arange(time, device=lengths.device) < lengths[:, None])[..., None, None]


def _is_wide(x: Wkv7Inputs | Wkv7BackwardInputs, states: Tensor) -> bool:
    """Whether the matrix form is worth while and exact: no strong decays, all inputs finite.

    On a GPU this waits for the inputs.
    """
    if x.key.shape[1] <= FEW or not x.key.numel():
        return False
    inputs = (x.receptance, x.log_decay, x.key, x.value, x.removal, x.replacement, states)
    # A sum that overflows is not finite either, and then the exact way is taken without need.
    total = torch.stack([part.sum(dtype=torch.float32) for part in inputs]).sum()
    return bool(total.isfinite() & (x.log_decay.abs().amax() <= STRONGEST))


# ---- pieces of time -----------------------------------------------------------------------------


def _in_pieces(x: Wkv7Inputs) -> Wkv7Results:
    """The matrix form for one piece after another; padding is zero already."""
    state, outputs, starts = x.state, [], []
    for first in range(0, x.key.shape[1], PIECE):
        out, state, kept = _forward(_between(x, first)._replace(state=state))
        outputs.append(out)
        starts.append(kept)
    if len(outputs) == 1:
        return outputs[0], state, starts[0]
    return torch.cat(outputs, dim=1), state, torch.cat(starts)


def _back_in_pieces(x: Wkv7BackwardInputs) -> Wkv7Gradients:
    """The gradient of the matrix form, from the last piece to the first."""
    grad_state, found = x.grad_state, []
    for first in reversed(range(0, x.key.shape[1], PIECE)):
        kept = x.starts[first // CHUNK : (first + PIECE) // CHUNK]
        piece = _between(x, first)._replace(starts=kept, grad_state=grad_state)
        *grads, grad_state = _backward(piece)
        found.append(grads)
    r, w, k, v, a, b = (torch.cat(parts[::-1], dim=1) for parts in zip(*found, strict=True))
    return r, w, k, v, a, b, grad_state


def _between(x: _Arguments, first: int) -> _Arguments:
    """The arguments with a piece of time that begins at a position, and without lengths."""
    fields = (*Wkv7Inputs._fields[:6], "resets", "grad_out")
    parts = {n: getattr(x, n, None) for n in fields}
    cut = {n: part[:, first : first + PIECE] for n, part in parts.items() if part is not None}
    return x._replace(lengths=None, **cut)


# ---- the matrix form ----------------------------------------------------------------------------


class _Chunks(NamedTuple):
    """What the matrix form holds of K chunks of n positions: each [K,B,H,n,N] unless noted."""

    # The inputs, in the dtype of the state. Zeros fill up the last chunk.
    r: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    # Their factors: e^{g_t}, e^{g_{t-1}} and e^{-g_t}.
    fade: Tensor
    fade_before: Tensor
    grow: Tensor
    # For positions that see the state before the chunk and that the state after it sees: 1, else 0.
    sees_start: Tensor | None  # [K,B,1,n,1]; None where nothing is ever reset
    reaches_end: Tensor | None
    same: Tensor | None  # [K,B,1,n,n]: whether two positions belong to the same document

    @property
    def keep(self) -> Tensor:
        """What the chunk leaves of the state before it: [K,B,H,1,N]."""
        end = self.fade[..., -1:, :]
        return end if self.sees_start is None else end * self.sees_start[..., -1:, :]

    def from_start(self, x: Tensor) -> Tensor:
        """Zero in the rows of positions that do not see the state before the chunk."""
        return x if self.sees_start is None else x * self.sees_start

    def to_end(self, x: Tensor) -> Tensor:
        """Fade rows of positions until the end of the chunk; zero where a reset comes before it."""
        x = x * self.fade[..., -1:, :]
        return x if self.reaches_end is None else x * self.reaches_end

    def past(self, products: Tensor, *, now: bool) -> Tensor:
        """Zero outside the pairs [K,B,H,n,n] in which the second position is seen by the first.

        These are the earlier positions of the same document, and with `now` the position itself.
        """
        products = products.tril_(0 if now else -1)
        return products if self.same is None else products.mul_(self.same)


class _Products(NamedTuple):
    """The matrices of the module's docstring, for every chunk."""

    r: Tensor  # R [K,B,H,n,N]
    a: Tensor
    b: Tensor
    k: Tensor
    rb: Tensor  # tril(R B^T) [K,B,H,n,n]
    rk: Tensor
    ak: Tensor  # stril(A K^T)
    inverse: Tensor  # of I - stril(A B^T)


def _forward(x: Wkv7Inputs) -> Wkv7Results:
    c = _cut(x, x.state.dtype)
    m = _products(c)
    # U = solved + through S^T, and S' = S keep + gain + U^T B. The first term of each is a tensor
    # into which the loop adds the rest.
    u, through = m.inverse @ (m.ak @ c.v), m.inverse @ c.from_start(m.a)
    b, keep = c.to_end(m.b), c.keep
    states = torch.cat((x.state[None], c.v.mT @ c.to_end(m.k)))
    for n in range(len(u)):
        before, after = states[n], states[n + 1].addcmul_(states[n], keep[n])
        u[n].flatten(0, 1).baddbmm_(through[n].flatten(0, 1), before.flatten(0, 1).mT)
        after.flatten(0, 1).baddbmm_(u[n].flatten(0, 1).mT, b[n].flatten(0, 1))
    starts = states[:-1]
    out = c.from_start(m.r) @ starts.mT + m.rb @ u + m.rk @ c.v
    return _join(out, x.key.shape[1]).to(x.value.dtype), states[-1].clone(), starts


def _backward(x: Wkv7BackwardInputs) -> Wkv7Gradients:
    """The gradients of _forward; z is that of the right side of the triangular system."""
    c, grad_out = _cut(x, x.starts.dtype), _split(x.grad_out.to(x.starts.dtype))
    m, starts = _products(c), x.starts
    u = m.inverse @ (c.from_start(m.a) @ starts.mT + m.ak @ c.v)
    ends, z, grad_state = _back_through_states(c, m, grad_out, x.grad_state)

    rb, rk = c.past(grad_out @ u.mT, now=True), c.past(grad_out @ c.v.mT, now=True)
    ab, ak = c.past(z @ u.mT, now=False), c.past(z @ c.v.mT, now=False)
    r = (c.from_start(grad_out @ starts) + rb @ m.b + rk @ m.k) * c.fade
    a = (c.from_start(z @ starts) + ab @ m.b + ak @ m.k) * c.fade_before
    b_end, k_end = c.to_end(u @ ends), c.to_end(c.v @ ends)
    b = (rb.mT @ m.r + ab.mT @ m.a + b_end) * c.grow
    k = (rk.mT @ m.r + ak.mT @ m.a + k_end) * c.grow
    v = m.rk.mT @ grad_out + m.ak.mT @ z + c.to_end(m.k) @ ends.mT

    # A factor e^g gives g the product of what it multiplies with the gradient of that, and g_t is
    # the sum of all log_decay up to t.
    g = c.r * r - c.b * b - c.k * k
    g[..., :-1, :] += (c.a * a)[..., 1:, :]
    g[..., -1, :] += (b_end * m.b + k_end * m.k).sum(-2)
    g[..., -1:, :] += (ends * starts).sum(-2, keepdim=True) * c.keep
    log_decay = g.flip(-2).cumsum(-2).flip(-2)

    time, inputs = x.key.shape[1], x[2:8]
    found = zip((r, log_decay, k, v, a, b), inputs, strict=True)
    r, log_decay, k, v, a, b = (_join(part, time).to(like.dtype) for part, like in found)
    return r, log_decay, k, v, a, b, grad_state


def _back_through_states(
    c: _Chunks, m: _Products, grad_out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the state after every chunk [K,B,H,N,N], z, and that of the first state.

    Z = solved + through G^T with G the gradient of the state after the chunk, and the gradient of
    the state before it is G keep + grad_out^T R + Z^T A. The loop is that of _forward, backward.
    """
    z = m.inverse.mT @ (m.rb.mT @ grad_out)
    through = m.inverse.mT @ c.to_end(m.b)
    a, keep = c.from_start(m.a), c.keep
    states = torch.cat((grad_out.mT @ c.from_start(m.r), grad[None]))
    for n in reversed(range(len(z))):
        before, after = states[n].addcmul_(states[n + 1], keep[n]), states[n + 1]
        z[n].flatten(0, 1).baddbmm_(through[n].flatten(0, 1), after.flatten(0, 1).mT)
        before.flatten(0, 1).baddbmm_(z[n].flatten(0, 1).mT, a[n].flatten(0, 1))
    return states[1:], z, states[0].clone()


def _products(c: _Chunks) -> _Products:
    r, a, b, k = c.r * c.fade, c.a * c.fade_before, c.b * c.grow, c.k * c.grow
    rb, rk = c.past(r @ b.mT, now=True), c.past(r @ k.mT, now=True)
    ab, ak = c.past(a @ b.mT, now=False), c.past(a @ k.mT, now=False)
    one = torch.eye(ab.shape[-1], dtype=ab.dtype, device=ab.device)
    inverse = torch.linalg.solve_triangular(
        one - ab, one.expand_as(ab), upper=False, unitriangular=True
    )
    return _Products(r, a, b, k, rb, rk, ak, inverse)


def _cut(x: Wkv7Inputs | Wkv7BackwardInputs, dtype: torch.dtype) -> _Chunks:
    r, log_decay, k, v, a, b = (
        _split(part.to(dtype))
        for part in (x.receptance, x.log_decay, x.key, x.value, x.removal, x.replacement)
    )
    g = log_decay.cumsum(-2)
    fade = g.exp()
    fade_before = F.pad(fade[..., :-1, :], (0, 0, 1, 0), value=1.0)
    sees_start = reaches_end = same = None
    if x.resets is not None:
        # The number of the document inside the chunk to which a position belongs.
        document = _split(x.resets[..., None, None].to(dtype)).cumsum(-2)
        sees_start = (document == 0).to(dtype)
        reaches_end = (document == document[..., -1:, :]).to(dtype)
        same = (document == document.mT).to(dtype)
    grow = g.neg_().exp_()
    return _Chunks(r, k, v, a, b, fade, fade_before, grow, sees_start, reaches_end, same)


def _split(x: Tensor) -> Tensor:
    """Cut time into chunks, the last filled up with zeros: [B,T,H,N] -> [K,B,H,n,N]."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK)).contiguous()
    return x.view(x.shape[0], -1, CHUNK, *x.shape[2:]).permute(1, 0, 3, 2, 4).contiguous()


def _join(x: Tensor, time: int) -> Tensor:
    """The inverse of _split, without what fills up the last chunk."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :time].contiguous()
