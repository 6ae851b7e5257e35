"""WKV-4 for GPUs: the kernel for outputs and states. Importing this imports triton.

Every lane sums up its piece. The lanes of a channel exchange their sums, and each lane goes on from
the state that the pieces before its own leave. A program with one piece in a tile is a loop over
time.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF059
# Triton's compiler gives the arguments their types, and knows neither (*rows, x) nor a name that
# changes its type in a loop, as an underscore would.

import triton
import triton.language as tl

from receptance.ops.triton_wkv4_lanes import (
    ABSENT,
    HIGH,
    LOW,
    SLACK,
    absorb,
    agreed,
    any_of,
    average,
    divide,
    factor,
    forget,
    is_reset,
    is_whole,
    lanes_of,
    largest,
    lengths_of,
    pace_of,
    rows_of,
    scan,
    settle,
    show,
    some_pairs,
    store,
    weights_of,
)


@triton.jit
def _quick(
    a, b, o, n, w, u, piece, inside, whole, token, key, value, out, starts, sums,
    C: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    ROUGH: tl.constexpr,
):  # fmt: skip
    """Store a tile's outputs and starts; the state after it, and whether a lane's are accurate."""
    pace, decay, bonus = pace_of(w, u, GROUP)
    k = rows_of(key, whole, token, w.dtype, C, GROUP)
    v = rows_of(value, whole, token, w.dtype, C, GROUP)
    top, low = largest(k), w * 0 + HIGH
    base = top
    if PIECES > 1:
        e, p, q = weights_of(k, base, pace * w), w * 0, w * 0
        for j in tl.static_range(GROUP):
            p, q = p * decay + e[j] * v[j], q * decay + e[j]
        low = q
        p, q, exponent = settle(p, q, base, pace * GROUP, w)
        show(sums + piece * 5 * C, inside, C, (p, q, exponent))
        a, b, o, n, after_a, after_b, after_o, after_n = scan(
            a, b, o, n, w, piece, inside, sums, C, PIECES, GROUP, False, False
        )
        store(starts, whole, C, settle(a, b, o, n, w))
        scale = factor(o, n, w, base)
        o, n = base, w * 0
    else:  # A frame that moves with the decay can stay until a larger key comes.
        store(starts, whole, C, settle(a, b, o, n, w))
        stays = (pace > 0) & (top <= o + n * w + SLACK)
        base = tl.where(stays, o + n * w, top)
        e = weights_of(k, base, pace * w)
        scale = tl.where(stays, 1.0, factor(o, n, w, base))
        o, n = tl.where(stays, o, base), tl.where(stays, n, 0.0)
    a, b, peak = a * scale, b * scale, w * 0
    for j in tl.static_range(GROUP):
        if j > 0 and j % CHUNK == 0:
            state = settle(a, b, o, n + j * pace, w)
            store(starts + j // CHUNK * 3 * C, whole, C, state)
        ev = e[j] * v[j]
        above, below = a + bonus * ev, b + bonus * e[j]
        low, peak = tl.minimum(low, below), tl.maximum(peak, tl.abs(above))
        tl.store(
            out + token + j * C, divide(above, below, ROUGH).to(out.dtype.element_ty), mask=whole
        )
        a, b = a * decay + ev, b * decay + e[j]
    sound = (low >= LOW) & (b >= LOW) & (b <= HIGH) & (peak <= HIGH) & (tl.abs(a) <= HIGH)
    if PIECES == 1:
        after_a, after_b, after_o, after_n = a, b, o, n + pace * GROUP
    return after_a, after_b, after_o, after_n, whole & sound & (bonus * bonus <= HIGH)


@triton.jit
def _sum(
    w, inside, left, key, value, resets, C: tl.constexpr, GROUP: tl.constexpr, SOME: tl.constexpr
):  # fmt: skip
    """A piece as one segment: numerator, denominator, exponent, tokens (ABSENT: it forgets)."""
    a, b, o, n = w * 0, w * 0, w * 0 + ABSENT, w * 0
    count = tl.minimum(tl.maximum(left, 0), GROUP).to(w.dtype)
    for first in range(0, GROUP, SOME):
        k, v = some_pairs(key, value, first, inside, left, w.dtype, C, SOME)
        for j in tl.static_range(SOME):
            real = inside & (left - first > j)
            if resets is not None:
                reset = is_reset(resets + (first + j), real)
                a, b, o, n = forget(a, b, o, n, reset)
                count = tl.where(reset, ABSENT, count)
            a, b, o, n, keep, add = absorb(a, b, o, n, w, real.to(w.dtype), k[j], v[j], 1.0)
    a, b, o = settle(a, b, o, n, w)
    return a, b, o, count


@triton.jit
def _careful(
    a, b, o, n, w, u, inside, left, room, key, value, resets, out, starts,
    C: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Store a piece's outputs and starts; the state after it. `left` tokens fit `room` places."""
    for first in range(0, GROUP, SOME):
        if first % CHUNK == 0:
            state = settle(a, b, o, n, w)
            store(starts + first // CHUNK * 3 * C, inside & (room > first), C, state)
        k, v = some_pairs(key, value, first, inside, left, w.dtype, C, SOME)
        for j in tl.static_range(SOME):
            real = inside & (left - first > j)
            if resets is not None:
                a, b, o, n = forget(a, b, o, n, is_reset(resets + (first + j), real))
            y, inverse, past, present = average(a, b, o, n, w, u + k[j], v[j])
            y = tl.where(real, y, 0.0).to(out.dtype.element_ty)
            tl.store(out + (first + j) * C, y, mask=inside & (room - first > j))
            a, b, o, n, keep, add = absorb(a, b, o, n, w, real.to(w.dtype), k[j], v[j], 1.0)
    return a, b, o, n


@triton.jit(do_not_specialize=["T", "N", "rows"])
def forward(
    log_decay, bonus, key, value, numerator, denominator, exponent, resets, lengths,
    sums, starts, out, numerator_out, denominator_out, exponent_out, T, N, rows,
    C: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    SOME: tl.constexpr, ROUGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The outputs [B,T,C], the states before every chunk and the last one [B,N,3,C] and [B,C].

    sums [B,PIECES,5,C] is memory through which the lanes of a channel exchange sums.
    """
    row, piece, c, inside = lanes_of(rows, C, PIECES, BLOCK)
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    u = tl.load(bonus + c, mask=inside, other=0.0)
    end, at = lengths_of(lengths, row, inside, T), row * C + c
    a = tl.load(numerator + at, mask=inside, other=0.0)
    b = tl.load(denominator + at, mask=inside, other=1.0)
    o = tl.load(exponent + at, mask=inside, other=0.0)
    n = w * 0
    starts += row * N * 3 * C + c
    sums += row * PIECES * 5 * C + c
    for first in range(0, T, PIECES * GROUP):
        position = first + piece * GROUP
        token = (row * T + position) * C + c
        k, v, y = key + token, value + token, out + token
        chunk = starts + (position // CHUNK).to(tl.int64) * 3 * C
        left, room, again = end - position, T - position, resets
        if resets is not None:
            again = resets + (row * T + position)
        whole = is_whole(again, inside, left, GROUP)
        after_a, after_b, after_o, after_n, sound = a, b, o, n, c < 0
        if any_of(whole):
            after_a, after_b, after_o, after_n, sound = _quick(
                a, b, o, n, w, u, piece, inside, whole, token, key, value, out, chunk, sums,
                C, PIECES, GROUP, CHUNK, ROUGH,
            )  # fmt: skip
        if any_of(inside & (sound == 0)):
            if PIECES > 1:
                p, q, e, count = _sum(w, inside, left, k, v, again, C, GROUP, SOME)
                show(sums + piece * 5 * C, inside, C, (p, q, e, count, sound.to(w.dtype)))
                a, b, o, n, last_a, last_b, last_o, last_n = scan(
                    a, b, o, n, w, piece, inside, sums, C, PIECES, GROUP, True, False
                )
                sound = agreed(sound, piece, inside, sums + 4 * C, C, PIECES)
            mask = inside & (sound == 0)
            a, b, o, n = _careful(
                a, b, o, n, w, u, mask, left, room, k, v, again, y, chunk, C, GROUP, CHUNK, SOME
            )
            if PIECES > 1:
                a, b, o, n = last_a, last_b, last_o, last_n
            after_a, after_b = tl.where(sound, after_a, a), tl.where(sound, after_b, b)
            after_o, after_n = tl.where(sound, after_o, o), tl.where(sound, after_n, n)
        a, b, o, n = after_a, after_b, after_o, after_n
    a, b, o = settle(a, b, o, n, w)
    store(starts + (row * 0 + N - 1) * 3 * C, inside & (piece == 0), C, (a, b, o))
    tl.store(numerator_out + at, a, mask=inside & (piece == 0))
    tl.store(denominator_out + at, b, mask=inside & (piece == 0))
    tl.store(exponent_out + at, o, mask=inside & (piece == 0))
