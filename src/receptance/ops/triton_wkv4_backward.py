"""WKV-4 for GPUs: the kernel for gradients. Importing this imports triton.

Tiles go last to first. Every lane runs forwards through its piece, from the state that the forward
pass left there; the lanes of a channel show each other what they do to a gradient that goes back
through them; then each goes back through its piece.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005, RUF059
# Triton's compiler gives the arguments their types, and knows neither (*rows, x) nor a name that
# changes its type in a loop, as an underscore would.

import triton
import triton.language as tl

from receptance.ops.triton_wkv4_lanes import (
    HIGH,
    LOW,
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
    show,
    some_pairs,
    some_rows,
    store,
    weights_of,
)


@triton.jit
def _load_state(at, mask, C: tl.constexpr):
    """A state from starts, or what does no harm."""
    a, b = tl.load(at, mask=mask, other=0.0), tl.load(at + C, mask=mask, other=1.0)
    return a, b, tl.load(at + 2 * C, mask=mask, other=0.0)


@triton.jit
def _scan_back(ga, gb, piece, inside, sums, C: tl.constexpr, PIECES: tl.constexpr):
    """The gradients after the lane's own piece, and those before the first.

    Through a piece the gradient of (a, b) goes back as g -> keep g + to.
    """
    own_a, own_b = ga, gb
    for back in tl.static_range(PIECES):
        mine, at = piece == PIECES - 1 - back, sums + (PIECES - 1 - back) * 5 * C
        own_a, own_b = tl.where(mine, ga, own_a), tl.where(mine, gb, own_b)
        keep = tl.load(at, mask=inside, other=1.0)
        to_a = tl.load(at + C, mask=inside, other=0.0)
        to_b = tl.load(at + 2 * C, mask=inside, other=0.0)
        ga = tl.where(keep == 0, 0.0, keep * ga) + to_a
        gb = tl.where(keep == 0, 0.0, keep * gb) + to_b
    return own_a, own_b, ga, gb


@triton.jit
def _quick(
    a, b, o, following, ga, gb, w, u, piece, inside, whole, token, key, value, grad_out, grad_key,
    grad_value, sums, C: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    ROUGH: tl.constexpr,
):  # fmt: skip
    """A tile: gradients of key and value stored, those of a and b before it, of w and u in it.

    And whether a lane's can be trusted. Frames are those of _quick_forward.
    """
    pace, decay, bonus = pace_of(w, u, GROUP)
    k = rows_of(key, whole, token, w.dtype, C, GROUP)
    v = rows_of(value, whole, token, w.dtype, C, GROUP)
    g = rows_of(grad_out, whole, token, w.dtype, C, GROUP)
    top, low = largest(k), w * 0 + HIGH
    e, scale = weights_of(k, top, pace * w), factor(o, 0.0, w, top)
    a, b, before, to_y = a * scale, b * scale, (), ()
    for j in tl.static_range(GROUP):
        ev = e[j] * v[j]
        below = b + bonus * e[j]
        low, inverse = tl.minimum(low, below), divide(1.0, below, ROUGH)
        y, to = (a + bonus * ev) * inverse, g[j] * inverse
        before, to_y = before + ((a, b),), to_y + ((y, to),)
        a, b = a * decay + ev, b * decay + e[j]
    change = factor(top, pace * GROUP, w, following)
    before_a, before_b = ga, gb
    if PIECES > 1:
        keep, to_a, to_b = factor(o, GROUP * 1.0, w, following), w * 0, w * 0
        for j in tl.static_range(GROUP - 1, -1, -1):
            to_a, to_b = to_a * decay + to_y[j][1], to_b * decay - to_y[j][0] * to_y[j][1]
        show(sums + piece * 5 * C, inside, C, (keep, to_a * scale, to_b * scale))
        ga, gb, before_a, before_b = _scan_back(ga, gb, piece, inside, sums, C, PIECES)
    ga, gb = ga * change, gb * change
    grad_decay, grad_bonus = w * 0, w * 0
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
        before_a, before_b = ga * scale, gb * scale
    grad_decay *= decay
    sound = (low >= LOW) & (b >= LOW) & (b <= HIGH) & (tl.abs(a) <= HIGH)
    sound = sound & (tl.abs(ga) <= HIGH) & (tl.abs(gb) <= HIGH) & (tl.abs(grad_decay) <= HIGH)
    return before_a, before_b, grad_decay, grad_bonus, whole & sound & (bonus * bonus <= HIGH)


@triton.jit
def _sweep(
    a, b, o, following, w, u, inside, left, key, value, grad_out, resets,
    C: tl.constexpr, GROUP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A piece forwards: keep, to for a and for b, and the factor from the next start's frame.

    keep comes from the exponents of the starts: the product of so many factors would round too
    often.
    """
    start, n, to_a, to_b, through = o, w * 0, w * 0, w * 0, w * 0 + 1
    for first in range(0, GROUP, SOME):
        k, v = some_pairs(key, value, first, inside, left, w.dtype, C, SOME)
        g = some_rows(grad_out + first * C, inside, left - first, 0.0, w.dtype, C, SOME)
        for j in tl.static_range(SOME):
            real = inside & (left - first > j)
            if resets is not None:
                reset = is_reset(resets + (first + j), real)
                a, b, o, n = forget(a, b, o, n, reset)
                through = tl.where(reset, 0.0, through)
            y, inverse, past, present = average(a, b, o, n, w, u + k[j], v[j])
            to = past * g[j] * inverse * through
            if resets is not None:  # nothing comes back past a reset, not even a NaN
                to, y = tl.where(through == 0, 0.0, to), tl.where(through == 0, 0.0, y)
            to_a, to_b = to_a + to, to_b - y * to
            a, b, o, n, keep, add = absorb(a, b, o, n, w, real.to(w.dtype), k[j], v[j], 1.0)
            through *= keep
    count = tl.minimum(tl.maximum(left, 0), GROUP).to(w.dtype)
    keep = factor(start, count, w, following)
    if resets is not None:
        keep = tl.where(through == 0, 0.0, keep)
    return keep, to_a, to_b, factor(o, n, w, following)


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
            if resets is not None:  # not even a NaN
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
    last = (T - 1) // (PIECES * GROUP) * (PIECES * GROUP)
    for back in range(0, T, PIECES * GROUP):
        first = last - back
        position = first + piece * GROUP
        token = (row * T + position) * C + c
        k, v, g = key + token, value + token, grad_out + token
        dk, dv = grad_key + token, grad_value + token
        start, exists = starts + (position // GROUP).to(tl.int64) * 3 * C, inside & (position < T)
        a, b, o = _load_state(start, exists, C)
        following = tl.load(start + 5 * C, mask=exists, other=0.0)
        before_a, before_b, decay, bonuses, sound = ga, gb, w * 0, w * 0, c < 0
        left, room, again = end - position, T - position, resets
        if resets is not None:
            again = resets + (row * T + position)
        whole = is_whole(again, inside, left, GROUP)
        if any_of(whole):
            before_a, before_b, decay, bonuses, sound = _quick(
                a, b, o, following, ga, gb, w, u, piece, inside, whole, token, key, value, grad_out,
                dk, dv, sums, C, PIECES, GROUP, ROUGH,
            )  # fmt: skip
        if any_of(inside & (sound == 0)):
            keep, to_a, to_b, change = _sweep(
                a, b, o, following, w, u, inside, left, k, v, g, again, C, GROUP, SOME
            )
            after_a, after_b, first_a, first_b = ga, gb, ga, gb
            if PIECES > 1:
                keep = tl.where(exists, keep, 1.0)
                parts = keep, to_a, to_b, to_b, sound.to(w.dtype)
                show(sums + piece * 5 * C, inside, C, parts)
                after_a, after_b, first_a, first_b = _scan_back(
                    ga, gb, piece, inside, sums, C, PIECES
                )
                sound = agreed(sound, piece, inside, sums + 4 * C, C, PIECES)
            ga, gb, careful_decay, careful_bonuses = _careful(
                a, b, o, after_a * change, after_b * change, w, u, inside & (sound == 0), left,
                room, k, v, g, again, dk, dv, C, GROUP, SOME,
            )  # fmt: skip
            if PIECES > 1:
                ga, gb = first_a, first_b
            before_a, before_b = tl.where(sound, before_a, ga), tl.where(sound, before_b, gb)
            decay = tl.where(sound, decay, careful_decay)
            bonuses = tl.where(sound, bonuses, careful_bonuses)
        ga, gb, all_decay, all_bonus = before_a, before_b, all_decay + decay, all_bonus + bonuses
    vectors = grad_vectors + ((row * PIECES + piece) * 2 * C + c)
    store(vectors, inside, C, (all_decay, all_bonus))
    tl.store(grad_numerator_in + at, ga, mask=inside & (piece == 0))
    tl.store(grad_denominator_in + at, gb, mask=inside & (piece == 0))
