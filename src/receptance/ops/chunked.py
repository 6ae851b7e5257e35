"""WKV-4 parallel over time in plain torch: any device, any length, no compiler.

A run of n tokens acts on the state as a segment (decay, exponent, p, q): the state fades by
decay = n log_decay and gains p e^exponent and q e^exponent. Segments compose associatively, so
time is cut into chunks: summarize every chunk at once, scan the few summaries, replay every chunk
at once from its own starting state. The number of torch calls grows with log T, not with T: loops
here run over the positions of a chunk, a constant, and each step works on all chunks together.

The gradient of numerator and denominator goes back through the factors of the forward pass, all
at most 1: g -> keep g + what y contributes. That composes in the same way, without exponentials.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.ops.arguments import BackwardInputs, Gradients, Inputs, Results

CHUNK = 16
# The exponent of a segment without tokens. It stays below that of an empty state, whatever decays
# are added to it.
ABSENT = -2e30
LOG2_E = math.log2(math.e)

Parts = list[Tensor]
"""The numerator, denominator and exponent of a state, or of a segment's contribution to it."""


class Chunks(NamedTuple):
    """The sequence cut into N chunks of n tokens, and what happens at each token.

    n is CHUNK, or the whole length of a sequence that is shorter.
    """

    log_decay: Tensor  # [C]
    bonus: Tensor  # [C]
    key: Tensor  # [B,N,n,C]; ABSENT where there is no token
    value: Tensor  # [B,N,n,C]
    real: Tensor | None  # [B,N,n,1] 1 for a token, 0 for padding
    resets: Tensor | None  # [B,N,n,1] whether the row starts afresh

    @property
    def positions(self) -> range:
        """The positions inside a chunk."""
        return range(self.key.shape[2])

    def decay(self, j: int) -> Tensor:
        """What position j adds to the exponent of the state: a decay, or 0 for padding."""
        return self.log_decay if self.real is None else self.log_decay * self.real[:, :, j]

    def reset(self, j: int) -> Tensor | None:
        """Whether position j forgets what came before it: [B,N,1]."""
        return None if self.resets is None else self.resets[:, :, j]

    def chunk_decay(self) -> Tensor:
        """The decay over whole chunks: broadcasts to [B,N,C]."""
        return self.log_decay * (len(self.positions) if self.real is None else self.real.sum(2))

    def chunk_resets(self) -> Tensor | None:
        """Whether anything before the chunk is forgotten in it: [B,N,1]."""
        return None if self.resets is None else self.resets.any(2)


def kept_states(time: int) -> int:
    """How many states forward keeps: one before every chunk."""
    return -(-time // CHUNK)


def forward(x: Inputs) -> Results:
    """Output [B,T,C], the final state's three parts [B,C], chunk starts [B,N,3,C]."""
    time, chunks = x.key.shape[1], _cut(x, x.exponent.dtype)
    starts, final = _chunk_starts(chunks, [x.numerator, x.denominator, x.exponent])
    state = [part.clone() for part in starts]
    out = torch.empty_like(chunks.value)
    work = torch.empty(4, *state[0].shape, dtype=out.dtype, device=out.device).unbind(0)
    for j in chunks.positions:
        _forget(state, chunks.reset(j))
        torch.div(*_output(chunks, j, state, *work), out=out[:, :, j])
        k, v = chunks.key[:, :, j], chunks.value[:, :, j]
        _absorb(state, chunks.decay(j), k, v, None, *work[:2])
    out = _uncut(out, time)
    if x.lengths is not None:
        out = out.masked_fill(~_within(x.lengths, time)[..., None], 0)
    if chunks.key.shape[1] == 1:
        final = [part[:, 0] for part in state]
    # Without tokens the final state is the initial one, and an op returns none of its inputs.
    a, b, o = (part.clone() for part in final)
    return out.to(x.value.dtype), a, b, o, torch.stack(starts, dim=2)


def backward(x: BackwardInputs) -> Gradients:
    """Gradients of log_decay, bonus, key, value, numerator, denominator (shapes as those)."""
    time, chunks = x.key.shape[1], _cut(x, x.starts.dtype)
    grad_y = _cut_gradient(x.grad_out, x.lengths, x.starts.dtype)
    replay, exponent = _replay(chunks, grad_y, x.starts)
    ga, gb, first_a, first_b = _gradients_at_chunk_ends(
        chunks, replay, x.starts[:, :, 2], exponent, x.grad_numerator, x.grad_denominator
    )
    grad_key, grad_value = torch.empty_like(chunks.key), torch.empty_like(chunks.value)
    grad_decay, grad_bonus = torch.zeros_like(ga), torch.zeros_like(ga)
    work = torch.empty_like(ga)
    for j in reversed(chunks.positions):
        at, v = replay[j], chunks.value[:, :, j]
        torch.addcmul(at.own_value, at.add, ga, out=grad_value[:, :, j])
        torch.mul(ga, v, out=work).add_(gb)
        torch.addcmul(at.own_key, at.add, work, out=grad_key[:, :, j])
        faded = torch.mul(ga, at.numerator, out=work).addcmul_(gb, at.denominator).mul_(at.keep)
        grad_decay += faded if chunks.real is None else faded.mul_(chunks.real[:, :, j])
        grad_bonus += at.own_key
        ga.mul_(at.keep).add_(at.to_a)
        gb.mul_(at.keep).add_(at.to_b)
    return (
        grad_decay.sum((0, 1)),
        grad_bonus.sum((0, 1)),
        _uncut(grad_key, time).to(x.key.dtype),
        _uncut(grad_value, time).to(x.value.dtype),
        first_a,
        first_b,
    )


def _cut(x: Inputs | BackwardInputs, dtype: torch.dtype) -> Chunks:
    """[B,T,C] -> [B,N,n,C], with padding that neither fades the state nor adds to it."""
    time, resets = x.key.shape[1], x.resets
    key, value = x.key.to(dtype).clamp(min=ABSENT), x.value.to(dtype)  # -inf - (-inf) is NaN
    real = None
    if x.lengths is not None or time % min(CHUNK, time or 1):
        limit = x.lengths if x.lengths is not None else torch.tensor([time], device=key.device)
        inside = _within(limit, time)[..., None]
        key, value = key.masked_fill(~inside, ABSENT), value.masked_fill(~inside, 0)
        real = _chunks(inside.to(dtype))
        resets = None if resets is None else resets & inside[..., 0]
    resets = None if resets is None else _chunks(resets[..., None])
    return Chunks(x.log_decay, x.bonus, _chunks(key, ABSENT), _chunks(value), real, resets)


def _within(lengths: Tensor, time: int) -> Tensor:
    """Whether each position is one of the row's tokens: [B] -> [B,T]."""
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def _chunks(x: Tensor, fill: float = 0) -> Tensor:
    """[B,T,C] -> [B,N,n,C]."""
    batch, time, width = x.shape
    size = min(CHUNK, time) or CHUNK
    missing = -time % size
    if missing:
        x = F.pad(x, (0, 0, 0, missing), value=fill)
    return x.reshape(batch, (time + missing) // size, size, width)


def _uncut(x: Tensor, time: int) -> Tensor:
    """[B,N,n,C] -> [B,T,C], contiguous."""
    return x.flatten(1, 2)[:, :time].contiguous()


def _cut_gradient(grad_out: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B,T,C] -> [B,N,n,C], zero where there is no token."""
    grad_out = grad_out.to(dtype)
    if lengths is not None:
        inside = _within(lengths, grad_out.shape[1])[..., None]
        grad_out = grad_out.masked_fill(~inside, 0)
    return _chunks(grad_out)


def _exp(x: Tensor) -> Tensor:
    """e^x in place, for x that is not needed again."""
    # torch.exp takes 3 times as long as exp2 on a CPU, and 20 times where it underflows.
    return x.mul_(LOG2_E).exp2_()


def _forget(state: Parts, resets: Tensor | None) -> None:
    """Leave nothing of the state, in place, where resets are true, not even a NaN."""
    if resets is not None:
        for x, nothing in zip(state, (0, 0, ABSENT), strict=True):
            x.masked_fill_(resets, nothing)


# The two functions below write into tensors that they are given, because allocating a tensor costs
# more than the arithmetic that fills it.


def _absorb(
    state: Parts,
    decay: Tensor,
    exponent: Tensor,
    p: Tensor,
    q: Tensor | None,
    keep: Tensor,
    add: Tensor,
) -> None:
    """Fade the state, then add the segment (exponent, p, q), in place; q None means 1.

    The factors of the old state and of the segment are left in keep and add.
    """
    top = torch.maximum(torch.add(state[2], decay, out=keep), exponent, out=add)
    # The subtraction comes first, so that what rounding takes from state[2] + decay stays in keep;
    # otherwise a slow decay would lose the same amount again with every token.
    _exp(torch.sub(state[2], top, out=keep).add_(decay))
    state[2].copy_(top)
    _exp(torch.sub(exponent, state[2], out=add))
    state[0].mul_(keep).addcmul_(add, p)
    state[1].mul_(keep)
    _ = state[1].add_(add) if q is None else state[1].addcmul_(add, q)


def _output(
    chunks: Chunks,
    j: int,
    state: Parts,
    past: Tensor,
    present: Tensor,
    numerator: Tensor,
    denominator: Tensor,
) -> tuple[Tensor, Tensor]:
    """y at position j of every chunk as a fraction, numerator and denominator [B,N,C].

    The factors of the past and of the present are left in the tensors of these names.
    """
    now = torch.add(chunks.bonus, chunks.key[:, :, j], out=present)
    top = torch.maximum(state[2], now, out=past)
    _exp(present.sub_(top))
    _exp(torch.sub(state[2], top, out=past))
    torch.mul(state[0], past, out=numerator).addcmul_(present, chunks.value[:, :, j])
    torch.mul(state[1], past, out=denominator).add_(present)
    if chunks.real is not None:  # Padding after an empty state would divide by 0.
        denominator.clamp_(min=torch.finfo(denominator.dtype).tiny)
    return numerator, denominator


def _chunk_starts(chunks: Chunks, state: Parts) -> tuple[Parts, Parts]:
    """The state before every chunk, three times [B,N,C], and after the last of several, [B,C]."""
    if chunks.key.shape[1] == 1:
        return [x.unsqueeze(1) for x in state], []
    return _scan(chunks.chunk_decay(), chunks.chunk_resets(), _summaries(chunks), state)


def _summaries(chunks: Chunks) -> Parts:
    """Every chunk as one segment, three times [B,N,C]: each key fades until the chunk's end."""
    if chunks.real is None:
        later = torch.arange(len(chunks.positions) - 1, -1, -1, device=chunks.key.device)[:, None]
    else:
        later = chunks.real.sum(2, keepdim=True) - chunks.real.cumsum(2)
    exponent, value = chunks.key, chunks.value
    exponent = torch.addcmul(exponent, later.to(exponent.dtype), chunks.log_decay)
    if chunks.resets is not None:
        forgotten = chunks.resets.sum(2, keepdim=True) > chunks.resets.cumsum(2)
        exponent, value = exponent.masked_fill(forgotten, ABSENT), value.masked_fill(forgotten, 0)
    top = exponent.amax(2)
    weight = _exp(exponent.sub_(top.unsqueeze(2)))
    return [(weight * value).sum(2), weight.sum(2), top]


def _nothing(pieces: Tensor) -> Parts:
    """For every chunk the segment that changes nothing: [B,N,n,C] -> three times [B,N,C]."""
    zero = torch.zeros_like(pieces[:, :, 0])
    return [zero, zero.clone(), torch.full_like(zero, ABSENT)]


def _scan(
    decay: Tensor, resets: Tensor | None, segments: Parts, state: Parts
) -> tuple[Parts, Parts]:
    """Run a state over N segments: the states before each [B,N,C], and the last one [B,C].

    resets [B,N,1] says which segments forget what comes before them.

    Many segments are themselves cut into chunks, so that the loops stay short at any length.
    """
    p, q, exponent = segments
    count = p.shape[1]
    decay = decay.expand_as(p)
    if count <= CHUNK:
        state, starts = [x.clone() for x in state], [torch.empty_like(p) for _ in state]
        work = torch.empty_like(state[0]), torch.empty_like(state[0])
        for n in range(count):
            for part, x in zip(starts, state, strict=True):
                part[:, n] = x
            _forget(state, None if resets is None else resets[:, n])
            _absorb(state, decay[:, n], exponent[:, n], p[:, n], q[:, n], *work)
        return starts, state
    p, q, decay = _chunks(p), _chunks(q), _chunks(decay)
    exponent = _chunks(exponent, ABSENT)
    resets = None if resets is None else _chunks(resets)
    summary = _nothing(p)
    work = torch.empty_like(summary[0]), torch.empty_like(summary[0])
    for j in range(CHUNK):
        _forget(summary, None if resets is None else resets[:, :, j])
        _absorb(summary, decay[:, :, j], exponent[:, :, j], p[:, :, j], q[:, :, j], *work)
    any_reset = None if resets is None else resets.any(2)
    running, final = _scan(decay.sum(2), any_reset, summary, state)
    out = [torch.empty_like(p) for _ in range(3)]
    for j in range(CHUNK):
        for part, x in zip(out, running, strict=True):
            part[:, :, j] = x
        _forget(running, None if resets is None else resets[:, :, j])
        _absorb(running, decay[:, :, j], exponent[:, :, j], p[:, :, j], q[:, :, j], *work)
    return [_uncut(part, count) for part in out], final


class _Position(NamedTuple):
    """What the backward pass needs of one position of every chunk, each [B,N,C]."""

    numerator: Tensor  # the state before it
    denominator: Tensor
    keep: Tensor  # the factors of the state's update, at most 1
    add: Tensor
    own_key: Tensor  # gradients through the token's own weight in y
    own_value: Tensor
    to_a: Tensor  # gradients of the state before it through y
    to_b: Tensor


def _replay(chunks: Chunks, grad_y: Tensor, starts: Tensor) -> tuple[list[_Position], Tensor]:
    """Recompute every chunk: all its positions, and the exponents at the chunks' ends, [B,N,C]."""
    state = [x.clone() for x in starts.unbind(2)]
    shape = len(_Position._fields), *state[0].shape
    positions = [_Position(*starts.new_empty(shape).unbind(0)) for _ in chunks.positions]
    for j, at in enumerate(positions):
        _forget(state, chunks.reset(j))
        at.numerator.copy_(state[0])
        at.denominator.copy_(state[1])
        past, present, top, bottom = at.to_a, at.own_value, at.to_b, at.own_key
        _output(chunks, j, state, past, present, top, bottom)
        y, q = top.div_(bottom), torch.div(grad_y[:, :, j], bottom, out=bottom)
        present.mul_(q)
        past.mul_(q)
        k, v = chunks.key[:, :, j], chunks.value[:, :, j]
        torch.sub(v, y, out=at.own_key).mul_(at.own_value)
        y.mul_(at.to_a).neg_()
        _absorb(state, chunks.decay(j), k, v, None, at.keep, at.add)
    return positions, state[2]


def _gradients_at_chunk_ends(
    chunks: Chunks,
    replay: list[_Position],
    start: Tensor,
    end: Tensor,
    ga: Tensor,
    gb: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of (numerator, denominator) after every chunk [B,N,C], before the first [B,C].

    Through a position it is g -> keep g + to, so through a chunk it is also of that form. The keep
    of a chunk comes from the exponents that the scan gave to its start and to the next one's: the
    product of so many factors would round too often. The replay ends a chunk in a frame that
    differs from the next start in the last places.
    """
    if not replay:
        empty = ga.unsqueeze(1)[:, :0]
        return empty, empty, ga.clone(), gb.clone()
    to_a, to_b = replay[-1].to_a.clone(), replay[-1].to_b.clone()
    for at in reversed(replay[:-1]):
        to_a.mul_(at.keep).add_(at.to_a)
        to_b.mul_(at.keep).add_(at.to_b)
    following = torch.cat([start[:, 1:], end[:, -1:]], dim=1)
    keep = _exp((start - following).add_(chunks.chunk_decay()))
    if chunks.resets is not None:
        keep = keep.masked_fill(chunks.resets.any(2), 0)
    change = _exp(end - following)
    ga, gb, first_a, first_b = _scan_back(keep, to_a, to_b, ga, gb)
    return ga.mul_(change), gb.mul_(change), first_a, first_b


def _scan_back(
    keep: Tensor, to_a: Tensor, to_b: Tensor, ga: Tensor, gb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Carry (ga, gb) [B,C] back through N pieces g -> keep g + to [B,N,C], the last piece first.

    Returns them after every piece, [B,N,C], and before the first, [B,C].
    """
    count = keep.shape[1]
    if count > CHUNK:  # as in _scan
        keep, to_a, to_b = _chunks(keep, 1), _chunks(to_a), _chunks(to_b)
        through, sum_a, sum_b = torch.ones_like(keep[:, :, 0]), to_a[:, :, 0] * 0, to_b[:, :, 0] * 0
        for j in reversed(range(CHUNK)):
            through = through * keep[:, :, j]
            sum_a = torch.addcmul(to_a[:, :, j], keep[:, :, j], sum_a)
            sum_b = torch.addcmul(to_b[:, :, j], keep[:, :, j], sum_b)
        ga, gb, first_a, first_b = _scan_back(through, sum_a, sum_b, ga, gb)
    after_a, after_b = torch.empty_like(to_a), torch.empty_like(to_b)
    for n in reversed(range(to_a.shape[-2])):
        after_a[..., n, :], after_b[..., n, :] = ga, gb
        ga = torch.addcmul(to_a[..., n, :], keep[..., n, :], ga)
        gb = torch.addcmul(to_b[..., n, :], keep[..., n, :], gb)
    if count > CHUNK:
        return _uncut(after_a, count), _uncut(after_b, count), first_a, first_b
    return after_a, after_b, ga, gb
