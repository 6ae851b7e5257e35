"""WKV-4 for GPUs: the Triton kernels that triton_wkv4 launches. Importing this imports triton.

A lane is one channel of one piece of a row: of a chunk, or of the whole row. Lanes never look at
each other, so how many a program has (BLOCK), and on how many warps, changes no bit of a result.
A lane goes through its tokens in groups and loads a whole group before it uses any of it: so the
loads are under way together. T, B and what follows from them are ordinary arguments: nothing is
compiled again for another length. Rows and tokens are counted in 64 bits.

Names: a and b are numerator and denominator in the frame e^{o + n w}. o was the exponent n tokens
ago and stays until something larger replaces it, because a slow decay that is added to o again and
again loses the same to rounding every time. What is stored is settled: n is 0.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005, RUF059
# Triton's compiler gives the arguments their types, and knows neither (*rows, x) nor a name that
# changes its type in a loop, as an underscore would.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# The exponent of nothing at all, as in ops/chunked.py.
ABSENT = tl.constexpr(-2e30)
# Padding on a state that has seen nothing would divide by 0.
SMALLEST = tl.constexpr(1e-37)


@triton.jit
def _lanes(program, parts, pieces, C: tl.constexpr, BLOCK: tl.constexpr):
    """What a program's lanes are: whether they exist, row, piece of the row, channel.

    parts is the number of rows times that of pieces. Lanes stay under 2^31: a piece of what fits
    into memory, if there are so many, is 64 tokens long. The limit is computed from C, not given,
    for the compiler to see that the lanes of a load of several channels exist together.
    """
    lane = program * BLOCK + tl.arange(0, BLOCK)
    piece = lane // C
    return lane < parts * C, (piece // pieces).to(tl.int64), (piece % pieces).to(tl.int64), lane % C


@triton.jit
def _last_first():
    """A program's place from the end: what the kernel before read last may still be cached."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _length(lengths, row, inside, T):
    """How many tokens a row has."""
    length = row * 0 + T
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + row, mask=inside, other=0), 0), length)
    return length


@triton.jit
def _rows(x, mask, left, other, dtype, STEP: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr):
    """A group of rows of x, STEP apart; `other` where a lane has fewer rows left than that."""
    rows = ()
    for j in tl.static_range(GROUP):
        real = mask if FULL else mask & (left > j)
        rows = rows + (tl.load(x + j * STEP, mask=real, other=other).to(dtype),)
    return rows


@triton.jit
def _load_state(a, b, o, mask):
    a, b = tl.load(a, mask=mask, other=0.0), tl.load(b, mask=mask, other=1.0)
    return a, b, tl.load(o, mask=mask, other=0.0)


@triton.jit
def _store(x, mask, STEP: tl.constexpr, parts):
    """Parts of one thing, STEP apart."""
    for i in tl.static_range(len(parts)):
        tl.store(x + i * STEP, parts[i], mask=mask)


@triton.jit
def _absorb(a, b, o, n, w, count, exponent, p, q):
    """The state after a segment of count tokens, and the factors of what was and of what came."""
    n += count
    gap = (o + n * w - exponent) * LOG2_E
    lesser, larger = tl.exp2(-tl.abs(gap)), gap < 0
    keep, add = tl.where(larger, lesser, 1.0), tl.where(larger, 1.0, lesser)
    o, n = tl.where(larger, exponent, o), tl.where(larger, 0.0, n)
    return a * keep + add * p, b * keep + add * q, o, n, keep, add


@triton.jit
def _average(a, b, o, n, w, now, v, FULL: tl.constexpr):
    """y, the inverse of its denominator, the factors of the past and of the present in both."""
    gap = (o + n * w - now) * LOG2_E
    lesser, larger = tl.exp2(-tl.abs(gap)), gap < 0
    past, present = tl.where(larger, lesser, 1.0), tl.where(larger, 1.0, lesser)
    denominator = b * past + present
    if not FULL:
        denominator = tl.maximum(denominator, SMALLEST)
    inverse = 1.0 / denominator
    return (a * past + present * v) * inverse, inverse, past, present


@triton.jit
def _factor(o, n, w, exponent):
    """From the frame e^{o + n w} to that of an exponent beside it."""
    return tl.exp2(((o - exponent) + n * w) * LOG2_E)


@triton.jit
def _settle(a, b, o, n, w):
    """The same state with n = 0; what rounding takes from the exponent goes into a and b."""
    exponent = o + n * w
    rest = _factor(o, n, w, exponent)
    return a * rest, b * rest, exponent


@triton.jit
def _reset(resets, t, mask):
    """Whether a lane forgets everything before position t."""
    return tl.load(resets + t, mask=mask, other=0) != 0


@triton.jit
def _forget(a, b, o, n, reset):
    """Nothing of the state where reset is true, not even a NaN."""
    a, b = tl.where(reset, 0.0, a), tl.where(reset, 0.0, b)
    return a, b, tl.where(reset, ABSENT, o), tl.where(reset, 0.0, n)


@triton.jit(do_not_specialize=["T", "N", "parts"])
def summarise(
    log_decay, key, value, resets, lengths, summaries, T, N, parts,
    C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every chunk as one segment: numerator, denominator, exponent, tokens -> [B,N,4,C].

    The number of tokens is ABSENT where the chunk forgets what came before it.
    """
    inside, row, chunk, c = _lanes(tl.program_id(0), parts, N, C, BLOCK)
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    end = _length(lengths, row, inside, T) - chunk * CHUNK
    count = tl.minimum(tl.maximum(end, 0), CHUNK).to(w.dtype)
    a, b, o, n = w * 0, w * 0, w * 0 + ABSENT, w * 0
    for first in range(0, tl.minimum(CHUNK, T), GROUP):
        t, left = row * T + chunk * CHUNK + first, end - first
        k = _rows(key + (t * C + c), inside, left, ABSENT, w.dtype, C, GROUP, FULL)
        v = _rows(value + (t * C + c), inside, left, 0.0, w.dtype, C, GROUP, FULL)
        for j in tl.static_range(GROUP):
            if resets is not None:
                reset = _reset(resets, t + j, inside & (left > j))
                a, b, o, n = _forget(a, b, o, n, reset)
                count = tl.where(reset, ABSENT, count)
            one = 1.0 if FULL else (left > j).to(w.dtype)
            a, b, o, n, keep, add = _absorb(a, b, o, n, w, one, k[j], v[j], 1.0)
    a, b, o = _settle(a, b, o, n, w)
    _store(summaries + ((row * N + chunk) * 4 * C + c), inside, C, (a, b, o, count))


@triton.jit(do_not_specialize=["N", "parts"])
def scan(
    log_decay, numerator, denominator, exponent, summaries, starts, N, parts,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state before every chunk [B,N,3,C], from the first [B,C] and the chunks [B,N,4,C]."""
    inside, row, piece, c = _lanes(tl.program_id(0), parts, 1, C, BLOCK)
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    at = row * C + c
    a, b, o = _load_state(numerator + at, denominator + at, exponent + at, inside)
    n = w * 0
    for first in range(0, N, GROUP):
        source, left = summaries + ((row * N + first) * 4 * C + c), row * 0 + N - first
        p = _rows(source, inside, left, 0.0, w.dtype, 4 * C, GROUP, False)
        q = _rows(source + C, inside, left, 0.0, w.dtype, 4 * C, GROUP, False)
        e = _rows(source + 2 * C, inside, left, ABSENT, w.dtype, 4 * C, GROUP, False)
        count = _rows(source + 3 * C, inside, left, 0.0, w.dtype, 4 * C, GROUP, False)
        for j in tl.static_range(GROUP):
            to = starts + ((row * N + first + j) * 3 * C + c)
            _store(to, inside & (left > j), C, _settle(a, b, o, n, w))
            a, b, o, n = _forget(a, b, o, n, count[j] < 0)
            passed = tl.maximum(count[j], 0.0)
            a, b, o, n, keep, add = _absorb(a, b, o, n, w, passed, e[j], p[j], q[j])


@triton.jit(do_not_specialize=["T", "N", "parts"])
def replay(
    log_decay, bonus, key, value, numerator, denominator, exponent, resets, lengths,
    starts, out, numerator_out, denominator_out, exponent_out, T, N, parts,
    C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr,
    SERIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The outputs [B,T,C] and the final state [B,C].

    A lane runs through one chunk from its state in starts [B,N,3,C], or, SERIAL, through a whole
    row from the initial state, and leaves the states in starts.
    """
    inside, row, piece, c = _lanes(_last_first(), parts, 1 if SERIAL else N, C, BLOCK)
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    u = tl.load(bonus + c, mask=inside, other=0.0)
    end = _length(lengths, row, inside, T)
    at, start = row * C + c, starts + ((row * N + piece) * 3 * C + c)
    if SERIAL:
        a, b, o = _load_state(numerator + at, denominator + at, exponent + at, inside)
    else:
        a, b, o = _load_state(start, start + C, start + 2 * C, inside)
    n = w * 0
    for chunk in range(0, N if SERIAL else 1):
        if SERIAL:
            _store(start + (piece + chunk) * 3 * C, inside, C, _settle(a, b, o, n, w))
        for first in range(0, tl.minimum(CHUNK, T - chunk * CHUNK), GROUP):
            position = (piece + chunk) * CHUNK + first
            t, left = row * T + position, end - position
            k = _rows(key + (t * C + c), inside, left, ABSENT, w.dtype, C, GROUP, FULL)
            v = _rows(value + (t * C + c), inside, left, 0.0, w.dtype, C, GROUP, FULL)
            for j in tl.static_range(GROUP):
                real, written, one = inside, inside, 1.0
                if not FULL:
                    real, written = inside & (left > j), inside & (T - position > j)
                    one = real.to(w.dtype)
                if resets is not None:
                    a, b, o, n = _forget(a, b, o, n, _reset(resets, t + j, real))
                y, inverse, past, present = _average(a, b, o, n, w, u + k[j], v[j], FULL)
                if not FULL:
                    y = tl.where(real, y, 0.0)
                tl.store(out + ((t + j) * C + c), y.to(out.dtype.element_ty), mask=written)
                a, b, o, n, keep, add = _absorb(a, b, o, n, w, one, k[j], v[j], 1.0)
    a, b, o = _settle(a, b, o, n, w)
    last = inside if SERIAL else inside & (piece == N - 1)
    tl.store(numerator_out + at, a, mask=last)
    tl.store(denominator_out + at, b, mask=last)
    tl.store(exponent_out + at, o, mask=last)


@triton.jit(do_not_specialize=["T", "N", "parts"])
def sweep(
    log_decay, bonus, key, value, grad_out, resets, lengths, starts, marks, links, T, N, parts,
    C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every chunk forwards: the state at its groups [B,N,G,4,C], and its links [B,N,4,C].

    The gradient of (a, b) goes back through a chunk as g -> keep g + to. The links are keep; the
    factor from the frame of the next start to that in which this chunk ends; to for a and for b.
    keep comes from the exponents that the scan gave to the starts: the product of so many factors
    would round too often.
    """
    inside, row, chunk, c = _lanes(tl.program_id(0), parts, N, C, BLOCK)
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    u = tl.load(bonus + c, mask=inside, other=0.0)
    end = _length(lengths, row, inside, T) - chunk * CHUNK
    count = tl.minimum(tl.maximum(end, 0), CHUNK).to(w.dtype)
    start = starts + ((row * N + chunk) * 3 * C + c)
    a, b, o = _load_state(start, start + C, start + 2 * C, inside)
    n, to_a, to_b, through, exponent = w * 0, w * 0, w * 0, w * 0 + 1, o
    for first in range(0, tl.minimum(CHUNK, T), GROUP):
        mark = (row * N + chunk) * (CHUNK // GROUP) + first // GROUP
        _store(marks + (mark * 4 * C + c), inside, C, (a, b, o, n))
        t, left = row * T + chunk * CHUNK + first, end - first
        k = _rows(key + (t * C + c), inside, left, ABSENT, w.dtype, C, GROUP, FULL)
        v = _rows(value + (t * C + c), inside, left, 0.0, w.dtype, C, GROUP, FULL)
        g = _rows(grad_out + (t * C + c), inside, left, 0.0, w.dtype, C, GROUP, FULL)
        for j in tl.static_range(GROUP):
            if resets is not None:
                reset = _reset(resets, t + j, inside & (left > j))
                a, b, o, n = _forget(a, b, o, n, reset)
                through = tl.where(reset, 0.0, through)
            y, inverse, past, present = _average(a, b, o, n, w, u + k[j], v[j], FULL)
            to = past * g[j] * inverse * through
            if resets is not None:  # nothing comes back past a reset, not even a NaN
                to, y = tl.where(through == 0, 0.0, to), tl.where(through == 0, 0.0, y)
            to_a, to_b = to_a + to, to_b - y * to
            one = 1.0 if FULL else (left > j).to(w.dtype)
            a, b, o, n, keep, add = _absorb(a, b, o, n, w, one, k[j], v[j], 1.0)
            through *= keep
    following = tl.load(start + 5 * C, mask=inside & (chunk < N - 1), other=0.0)
    following = tl.where(chunk < N - 1, following, o + n * w)
    keep = _factor(exponent, count, w, following)
    if resets is not None:
        keep = tl.where(through == 0, 0.0, keep)
    change = _factor(o, n, w, following)
    _store(links + ((row * N + chunk) * 4 * C + c), inside, C, (keep, change, to_a, to_b))


@triton.jit(do_not_specialize=["N", "parts"])
def scan_back(
    links, grad_numerator, grad_denominator, ends, grad_numerator_in, grad_denominator_in, N, parts,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the state after every chunk [B,N,2,C] and of the initial one [B,C]."""
    inside, row, piece, c = _lanes(tl.program_id(0), parts, 1, C, BLOCK)
    at = row * C + c
    ga = tl.load(grad_numerator + at, mask=inside, other=0.0)
    gb = tl.load(grad_denominator + at, mask=inside, other=0.0)
    for first in range(0, N, GROUP):
        chunk, left = row * N + (N - 1 - first), row * 0 + N - first
        source = links + (chunk * 4 * C + c)
        keep = _rows(source, inside, left, 1.0, ga.dtype, -4 * C, GROUP, False)
        change = _rows(source + C, inside, left, 1.0, ga.dtype, -4 * C, GROUP, False)
        to_a = _rows(source + 2 * C, inside, left, 0.0, ga.dtype, -4 * C, GROUP, False)
        to_b = _rows(source + 3 * C, inside, left, 0.0, ga.dtype, -4 * C, GROUP, False)
        for j in tl.static_range(GROUP):
            to = ends + ((chunk - j) * 2 * C + c)
            _store(to, inside & (left > j), C, (ga * change[j], gb * change[j]))
            ga = tl.where(keep[j] == 0, 0.0, keep[j] * ga) + to_a[j]
            gb = tl.where(keep[j] == 0, 0.0, keep[j] * gb) + to_b[j]
    tl.store(grad_numerator_in + at, ga, mask=inside)
    tl.store(grad_denominator_in + at, gb, mask=inside)


@triton.jit
def _mark(
    a, b, o, w, key, value, resets, marks, t, left, mask, length,
    C: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Run through a chunk and leave the state at its groups in marks; o and n at its end."""
    n = w * 0
    for first in range(0, length, GROUP):
        _store(marks + (first // GROUP) * 4 * C, mask, C, (a, b, o, n))
        at = (t + first) * C
        k = _rows(key + at, mask, left - first, ABSENT, w.dtype, C, GROUP, FULL)
        v = _rows(value + at, mask, left - first, 0.0, w.dtype, C, GROUP, FULL)
        for j in tl.static_range(GROUP):
            real = mask & (left - first > j)
            if resets is not None:
                a, b, o, n = _forget(a, b, o, n, _reset(resets, t + first + j, real))
            one = 1.0 if FULL else real.to(w.dtype)
            a, b, o, n, keep, add = _absorb(a, b, o, n, w, one, k[j], v[j], 1.0)
    return o, n


@triton.jit(do_not_specialize=["T", "N", "parts"])
def reverse(
    log_decay, bonus, key, value, grad_out, resets, lengths, starts, marks, ends,
    grad_numerator_in, grad_denominator_in, grad_vectors, grad_key, grad_value, T, N, parts,
    C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr,
    SERIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of key and value [B,T,C], and of decay and bonus chunk by chunk [B,N,2,C].

    Groups last to first: each runs forwards from its mark, then back through the factors that this
    left, all at most 1. A lane has one chunk, with the gradient at its end in ends [B,N,2,C] and
    marks [B,N,G,4,C] by sweep; or, SERIAL, a row: the last of its chunks first, with that gradient
    in ends [B,2,C], and marks [B,G,4,C] that it makes itself, for a chunk at a time.
    """
    inside, row, piece, c = _lanes(_last_first(), parts, 1 if SERIAL else N, C, BLOCK)
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    u = tl.load(bonus + c, mask=inside, other=0.0)
    end = _length(lengths, row, inside, T)
    part = row if SERIAL else row * N + piece
    marks += part * (CHUNK // GROUP * 4 * C) + c
    ga = tl.load(ends + (part * 2 * C + c), mask=inside, other=0.0)
    gb = tl.load(ends + (part * 2 * C + C + c), mask=inside, other=0.0)
    for back in range(0, N if SERIAL else 1):
        chunk = piece + (N - 1 - back if SERIAL else 0)
        length = tl.minimum(CHUNK, T - (N - 1 - back) * CHUNK if SERIAL else T)
        if SERIAL:
            tl.debug_barrier()  # another thread of the program may be at the marks still
            start, t = starts + ((row * N + chunk) * 3 * C + c), row * T + chunk * CHUNK
            a, b, o = _load_state(start, start + C, start + 2 * C, inside)
            o, n = _mark(
                a, b, o, w, key + c, value + c, resets, marks, t, end - chunk * CHUNK, inside,
                length, C, GROUP, FULL,
            )  # fmt: skip
            following = tl.load(start + 5 * C, mask=inside & (chunk < N - 1), other=0.0)
            change = _factor(o, n, w, tl.where(chunk < N - 1, following, o + n * w))
            ga, gb = ga * change, gb * change
            tl.debug_barrier()
        grad_decay, grad_bonus = w * 0, w * 0
        groups = (length + GROUP - 1) // GROUP
        for last in range(0, groups):
            mark = marks + (groups - 1 - last) * 4 * C
            a, b, o = _load_state(mark, mark + C, mark + 2 * C, inside)
            n = tl.load(mark + 3 * C, mask=inside, other=0.0)
            position = chunk * CHUNK + (groups - 1 - last) * GROUP
            t, left = row * T + position, end - position
            k = _rows(key + (t * C + c), inside, left, ABSENT, w.dtype, C, GROUP, FULL)
            v = _rows(value + (t * C + c), inside, left, 0.0, w.dtype, C, GROUP, FULL)
            g = _rows(grad_out + (t * C + c), inside, left, 0.0, w.dtype, C, GROUP, FULL)
            before, factors, forgot = (), (), ()
            for j in tl.static_range(GROUP):
                if resets is not None:
                    reset = _reset(resets, t + j, inside & (left > j))
                    a, b, o, n = _forget(a, b, o, n, reset)
                    forgot = forgot + (reset,)
                before = before + ((a, b, o, n),)
                one = 1.0 if FULL else (left > j).to(w.dtype)
                a, b, o, n, keep, add = _absorb(a, b, o, n, w, one, k[j], v[j], 1.0)
                factors = factors + ((keep, add),)
            for j in tl.static_range(GROUP - 1, -1, -1):
                a, b, o, n = before[j]
                keep, add = factors[j]
                y, inverse, past, present = _average(a, b, o, n, w, u + k[j], v[j], FULL)
                q = g[j] * inverse
                to, dv = past * q, present * q
                dk = (v[j] - y) * dv
                grad_bonus += dk
                dv, dk = dv + add * ga, dk + add * (ga * v[j] + gb)
                faded, written = keep * (ga * a + gb * b), inside
                if not FULL:
                    real, written = left > j, inside & (T - position > j)
                    faded = tl.where(real, faded, 0.0)
                    dv, dk = tl.where(real, dv, 0.0), tl.where(real, dk, 0.0)
                grad_decay += faded
                at = (t + j) * C + c
                tl.store(grad_key + at, dk.to(grad_key.dtype.element_ty), mask=written)
                tl.store(grad_value + at, dv.to(grad_value.dtype.element_ty), mask=written)
                ga, gb = keep * ga + to, keep * gb - y * to
                if resets is not None:  # not even a NaN
                    ga, gb = tl.where(forgot[j], 0.0, ga), tl.where(forgot[j], 0.0, gb)
        vectors = grad_vectors + ((row * N + chunk) * 2 * C + c)
        _store(vectors, inside, C, (grad_decay, grad_bonus))
    if SERIAL:
        tl.store(grad_numerator_in + (row * C + c), ga, mask=inside)
        tl.store(grad_denominator_in + (row * C + c), gb, mask=inside)
