"""WKV-4 for GPUs: the kernel for gradients. Importing this imports triton.

The tiles are processed from the last to the first. Every lane first recomputes its piece forwards,
from the state that the forward pass kept there. The lanes of a channel then exchange what their
pieces do to a gradient that goes back through them, and each lane goes back through its piece.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005, RUF059
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
    show,
    some_pairs,
    some_rows,
    store,
    weights_of,
)


@triton.jit
def _quick(
    a, b, o, ga, gb, go, gn, w, u, piece, inside, whole, token, key, value, grad_out, grad_key,
    grad_value, sums, C: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    ROUGH: tl.constexpr,
):  # fmt: skip
    """Store a tile's gradients of key and value; return those of the state before it, of w and u.

    Also returns whether those of a lane are accurate. Frames are those of the quick forward pass.
    """
    pace, decay, bonus = pace_of(w, u, GROUP)
    k = rows_of(key, whole, token, w.dtype, C, GROUP)
    v = rows_of(value, whole, token, w.dtype, C, GROUP)
    g = rows_of(grad_out, whole, token, w.dtype, C, GROUP)
    top, low = largest(k), w * 0 + HIGH
    base, stays = top, pace < 0
    if PIECES == 1:  # The frame of a gradient from later tokens can stay, too.
        here = -go - (gn + GROUP) * w
        stays = (pace > 0) & (top - here <= SLACK) & (tl.abs(o - here) <= SLACK)
        base = tl.where(stays, here, top)
    e, scale = weights_of(k, base, pace * w), factor(o, 0.0, w, base)
    a, b, before, to_y = a * scale, b * scale, (), ()
    for j in tl.static_range(GROUP):
        ev = e[j] * v[j]
        below = b + bonus * e[j]
        low, inverse = tl.minimum(low, below), divide(1.0, below, ROUGH)
        y, to = (a + bonus * ev) * inverse, g[j] * inverse
        before, to_y = before + ((a, b),), to_y + ((y, to),)
        a, b = a * decay + ev, b * decay + e[j]
    if PIECES > 1:
        to_a, to_b = w * 0, w * 0
        for j in tl.static_range(GROUP - 1, -1, -1):
            to_a, to_b = to_a * decay + to_y[j][1], to_b * decay - to_y[j][0] * to_y[j][1]
        # In the frame of the start, where the state is not small: so they are not large.
        show(sums + piece * 5 * C, inside, C, (to_a * scale, to_b * scale, -o))
        ga, gb, go, gn, first_a, first_b, first_o, first_n = scan(
            ga, gb, go, gn, w, piece, inside, sums, C, PIECES, GROUP, False, True
        )
    change = tl.where(stays, 1.0, factor(base, pace * GROUP + gn, w, -go))
    ga, gb, grad_decay, grad_bonus = ga * change, gb * change, w * 0, w * 0
    for j in tl.static_range(GROUP - 1, -1, -1):
        y, to = to_y[j]
        own = to * bonus * e[j]
        dk = own * (v[j] - y)
        grad_bonus += dk
        grad_decay += ga * before[j][0] + gb * before[j][1]
        dv, dk = own + e[j] * ga, dk + e[j] * (ga * v[j] + gb)
        tl.store(grad_key + j * C, dk.to(grad_key.dtype.element_ty), mask=whole)
        tl.store(grad_value + j * C, dv.to(grad_value.dtype.element_ty), mask=whole)
        ga, gb = decay * ga + to, decay * gb - to * y
    if PIECES == 1:
        first_a, first_b = tl.where(stays, ga, ga * scale), tl.where(stays, gb, gb * scale)
        first_o, first_n = tl.where(stays, go, -o), tl.where(stays, gn + GROUP, 0.0)
    grad_decay *= decay
    sound = (low >= LOW) & (b >= LOW) & (b <= HIGH) & (tl.abs(a) <= HIGH)
    sound = sound & (tl.abs(ga) <= HIGH) & (tl.abs(gb) <= HIGH) & (tl.abs(grad_decay) <= HIGH)
    sound = whole & sound & (bonus * bonus <= HIGH)
    return first_a, first_b, first_o, first_n, grad_decay, grad_bonus, sound


@triton.jit
def _sweep(
    a, b, o, w, u, inside, left, key, value, grad_out, resets,
    C: tl.constexpr, GROUP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A piece forwards: what it adds to the gradient of the state before it, and its tokens.

    ABSENT tokens: nothing comes back through it. And the frame in which the piece ends.
    """
    n, to_a, to_b, through = w * 0, w * 0, w * 0, w * 0 + 1
    count = tl.minimum(tl.maximum(left, 0), GROUP).to(w.dtype)
    for first in range(0, GROUP, SOME):
        k, v = some_pairs(key, value, first, inside, left, w.dtype, C, SOME)
        g = some_rows(grad_out + first * C, inside, left - first, 0.0, w.dtype, C, SOME)
        for j in tl.static_range(SOME):
            real = inside & (left - first > j)
            if resets is not None:
                reset = is_reset(resets + (first + j), real)
                a, b, o, n = forget(a, b, o, n, reset)
                through, count = tl.where(reset, 0.0, through), tl.where(reset, ABSENT, count)
            y, inverse, past, present = average(a, b, o, n, w, u + k[j], v[j])
            to = past * g[j] * inverse * through
            if resets is not None:  # No gradient passes a reset, not even a NaN.
                to, y = tl.where(count < 0, 0.0, to), tl.where(count < 0, 0.0, y)
            to_a, to_b = to_a + to, to_b - y * to
            a, b, o, n, keep, add = absorb(a, b, o, n, w, real.to(w.dtype), k[j], v[j], 1.0)
            through *= keep
    return to_a, to_b, count, o, n


@triton.jit
def _careful(
    a, b, o, ga, gb, w, u, inside, left, room, key, value, grad_out, resets, grad_key, grad_value,
    C: tl.constexpr, GROUP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A piece: gradients of key and value stored, those of a and b before it, of w and u in it.

    Some tokens at a time, the last first: forwards from the start, then back through the factors
    that this left, all at most 1.
    """
    start_a, start_b, start_o, grad_decay, grad_bonus = a, b, o, w * 0, w * 0
    for back in range(0, GROUP, SOME):
        a, b, o, n = start_a, start_b, start_o, w * 0
        for first in range(0, GROUP - SOME - back, SOME):
            k, v = some_pairs(key, value, first, inside, left, w.dtype, C, SOME)
            for j in tl.static_range(SOME):
                real = inside & (left - first > j)
                if resets is not None:
                    a, b, o, n = forget(a, b, o, n, is_reset(resets + (first + j), real))
                a, b, o, n, keep, add = absorb(a, b, o, n, w, real.to(w.dtype), k[j], v[j], 1.0)
        first = GROUP - SOME - back
        k, v = some_pairs(key, value, first, inside, left, w.dtype, C, SOME)
        g = some_rows(grad_out + first * C, inside, left - first, 0.0, w.dtype, C, SOME)
        before, factors, forgot = (), (), ()
        for j in tl.static_range(SOME):
            real = inside & (left - first > j)
            if resets is not None:
                reset = is_reset(resets + (first + j), real)
                a, b, o, n = forget(a, b, o, n, reset)
                forgot = forgot + (reset,)
            before = before + ((a, b, o, n),)
            a, b, o, n, keep, add = absorb(a, b, o, n, w, real.to(w.dtype), k[j], v[j], 1.0)
            factors = factors + ((keep, add),)
        for j in tl.static_range(SOME - 1, -1, -1):
            a, b, o, n = before[j]
            keep, add = factors[j]
            real, written = left - first > j, inside & (room - first > j)
            y, inverse, past, present = average(a, b, o, n, w, u + k[j], v[j])
            q = g[j] * inverse
            to, dv = past * q, present * q
            dk = (v[j] - y) * dv
            grad_bonus += dk
            dv, dk = dv + add * ga, dk + add * (ga * v[j] + gb)
            grad_decay += tl.where(real, keep * (ga * a + gb * b), 0.0)
            dv, dk = tl.where(real, dv, 0.0), tl.where(real, dk, 0.0)
            at = (first + j) * C
            tl.store(grad_key + at, dk.to(grad_key.dtype.element_ty), mask=written)
            tl.store(grad_value + at, dv.to(grad_value.dtype.element_ty), mask=written)
            ga, gb = keep * ga + to, keep * gb - y * to
            if resets is not None:  # Not even a NaN passes.
                ga, gb = tl.where(forgot[j], 0.0, ga), tl.where(forgot[j], 0.0, gb)
    return ga, gb, grad_decay, grad_bonus


@triton.jit(do_not_specialize=["T", "N", "rows"])
def backward(
    log_decay, bonus, key, value, grad_out, resets, lengths, starts, grad_numerator,
    grad_denominator, sums, grad_vectors, grad_key, grad_value, grad_numerator_in,
    grad_denominator_in, T, N, rows, C: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    SOME: tl.constexpr, ROUGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of key and value [B,T,C], of the initial state [B,C], of decay and bonus.

    The last two for every row and piece of its tiles [B,PIECES,2,C]. Pieces are chunks, starts
    [B,N,3,C] as `forward` left them; sums as there. Tiles go last to first.
    """
    row, piece, c, inside = lanes_of(rows, C, PIECES, BLOCK)
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    u = tl.load(bonus + c, mask=inside, other=0.0)
    end, at = lengths_of(lengths, row, inside, T), row * C + c
    ga = tl.load(grad_numerator + at, mask=inside, other=0.0)
    gb = tl.load(grad_denominator + at, mask=inside, other=0.0)
    all_decay, all_bonus = w * 0, w * 0
    starts += row * N * 3 * C + c
    sums += row * PIECES * 5 * C + c
    go = -tl.load(starts + ((row * 0 + N - 1) * 3 + 2) * C, mask=inside, other=0.0)
    gn = w * 0
    last = (T - 1) // (PIECES * GROUP) * (PIECES * GROUP)
    for back in range(0, T, PIECES * GROUP):
        position = last - back + piece * GROUP
        token = (row * T + position) * C + c
        k, v, g = key + token, value + token, grad_out + token
        dk, dv = grad_key + token, grad_value + token
        start, exists = starts + (position // GROUP).to(tl.int64) * 3 * C, inside & (position < T)
        a = tl.load(start, mask=exists, other=0.0)
        b = tl.load(start + C, mask=exists, other=1.0)
        o = tl.load(start + 2 * C, mask=exists, other=0.0)
        left, room, again = end - position, T - position, resets
        if resets is not None:
            again = resets + (row * T + position)
        whole = is_whole(again, inside, left, GROUP)
        first_a, first_b, first_o, first_n = ga, gb, go, gn
        decay, bonuses, sound = w * 0, w * 0, c < 0
        if any_of(whole):
            first_a, first_b, first_o, first_n, decay, bonuses, sound = _quick(
                a, b, o, ga, gb, go, gn, w, u, piece, inside, whole, token, key, value, grad_out,
                dk, dv, sums, C, PIECES, GROUP, ROUGH,
            )  # fmt: skip
        if any_of(inside & (sound == 0)):
            to_a, to_b, count, end_o, end_n = _sweep(
                a, b, o, w, u, inside, left, k, v, g, again, C, GROUP, SOME
            )
            if PIECES > 1:
                exponent = tl.where(count == 0, ABSENT, -o)
                parts = to_a, to_b, exponent, count, sound.to(w.dtype)
                show(sums + piece * 5 * C, inside, C, parts)
                ga, gb, go, gn, all_a, all_b, all_o, all_n = scan(
                    ga, gb, go, gn, w, piece, inside, sums, C, PIECES, GROUP, True, True
                )
                sound = agreed(sound, piece, inside, sums + 4 * C, C, PIECES)
            change = factor(end_o, end_n + gn, w, -go)
            ga, gb, careful_decay, careful_bonuses = _careful(
                a, b, o, ga * change, gb * change, w, u, inside & (sound == 0), left, room,
                k, v, g, again, dk, dv, C, GROUP, SOME,
            )  # fmt: skip
            go, gn = -o, w * 0
            if PIECES > 1:
                ga, gb, go, gn = all_a, all_b, all_o, all_n
            first_a, first_b = tl.where(sound, first_a, ga), tl.where(sound, first_b, gb)
            first_o, first_n = tl.where(sound, first_o, go), tl.where(sound, first_n, gn)
            decay = tl.where(sound, decay, careful_decay)
            bonuses = tl.where(sound, bonuses, careful_bonuses)
        ga, gb, go, gn = first_a, first_b, first_o, first_n
        all_decay, all_bonus = all_decay + decay, all_bonus + bonuses
    change = factor(tl.load(starts + 2 * C, mask=inside, other=0.0), gn, w, -go)
    ga, gb = ga * change, gb * change
    vectors = grad_vectors + ((row * PIECES + piece) * 2 * C + c)
    store(vectors, inside, C, (all_decay, all_bonus))
    tl.store(grad_numerator_in + at, ga, mask=inside & (piece == 0))
    tl.store(grad_denominator_in + at, gb, mask=inside & (piece == 0))
