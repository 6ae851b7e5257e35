"""What the Triton kernels of WKV-4 share: their lanes, what lanes read and exchange, and states.

A program has BLOCK channels, usually of one row, and goes through time tile by tile. A tile is
PIECES pieces of GROUP tokens, and a lane has one piece of one channel. Where the quick way
suffices, every token is read once. Lanes of different channels exchange nothing, so BLOCK and the
number of warps change no bit of a result. Offsets of rows and tokens have 64 bits.

A lane has two ways through its piece. A channel's tile takes the quick one if all its lanes can:

quick     The whole piece has one frame, e^(its largest key), and a token takes one exponential.
careful   The frame follows the largest exponent so far, and so it is exact whatever the keys are.
          This way has masks, resets and ends of rows. It is for keys that lie too far apart for
          the quick way, and for pieces that are not whole.

Names: a and b are numerator and denominator in the frame e^{o + n w}. o was the exponent n tokens
ago and stays until a larger one replaces it, because a slow decay that is added to o again and
again loses the same amount to rounding every time. Stored states are settled: their n is 0.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005, RUF059
# Triton's compiler gives the arguments their types, and knows neither (*rows, x) nor a name that
# changes its type in a loop, as an underscore would.

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2_E = tl.constexpr(1.4426950408889634)
# The exponent of a segment without tokens, as in ops/chunked.py.
ABSENT = tl.constexpr(-2e30)
# The smallest denominator: padding after an empty state would divide by 0.
SMALLEST = tl.constexpr(1e-37)
# The sums of the quick way are between these; a number it rounds to 0 is 1e-18 of the smallest sum.
LOW, HIGH = tl.constexpr(1e-20), tl.constexpr(1e30)
# A frame may move by so much (a factor of e^4) within a piece, or lie so far below a key.
SLACK = tl.constexpr(4.0)


@triton.jit
def lanes_of(rows, C: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """The row, piece and channel of every lane, and whether the lane exists.

    The limit is computed from C, not given, for the compiler to see that the lanes of a load of
    several channels exist together.
    """
    lane = tl.arange(0, PIECES * BLOCK)
    place = tl.program_id(0) * BLOCK + lane % BLOCK
    return (place // C).to(tl.int64), lane // BLOCK, place % C, place < rows * C


@triton.jit
def lengths_of(lengths, row, inside, T):
    """How many tokens a row has."""
    length = row * 0 + T
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + row, mask=inside, other=0), 0), length)
    return length


@triton.jit
def is_reset(resets, mask):
    """Whether a lane forgets everything before a token."""
    return tl.load(resets, mask=mask, other=0) != 0


@triton.jit
def is_whole(resets, inside, left, GROUP: tl.constexpr):
    """Whether a piece is inside its row and forgets nothing."""
    whole = inside & (left >= GROUP)
    if resets is not None:
        tokens = resets[:, None] + tl.arange(0, GROUP)[None, :]
        found = tl.load(tokens, mask=whole[:, None], other=0).to(tl.int32)
        whole = whole & (tl.sum(found, 1) == 0)
    return whole


@triton.jit
def any_of(lanes):
    """Whether any lane of the program has a true value."""
    return tl.sum(lanes.to(tl.int32), 0) > 0


@triton.jit
def rows_of(x, whole, offset, dtype, C: tl.constexpr, GROUP: tl.constexpr):
    """The tokens of a piece, or of another if it is not whole: loads without masks are faster."""
    rows, x = (), x + tl.where(whole, offset, 0)
    for j in tl.static_range(GROUP):
        rows = rows + (tl.load(x + j * C).to(dtype),)
    return rows


@triton.jit
def some_rows(x, mask, left, other, dtype, C: tl.constexpr, GROUP: tl.constexpr):
    """A few tokens of a piece, and `other` in their place where the lane has fewer left."""
    rows = ()
    for j in tl.static_range(GROUP):
        rows = rows + (tl.load(x + j * C, mask=mask & (left > j), other=other).to(dtype),)
    return rows


@triton.jit
def some_pairs(key, value, first, mask, left, dtype, C: tl.constexpr, GROUP: tl.constexpr):
    """Keys and values of a few tokens of a piece, from its token `first` on."""
    k = some_rows(key + first * C, mask, left - first, ABSENT, dtype, C, GROUP)
    return k, some_rows(value + first * C, mask, left - first, 0.0, dtype, C, GROUP)


@triton.jit
def store(x, mask, C: tl.constexpr, parts):
    """Store the parts of one tuple, C elements apart."""
    for i in tl.static_range(len(parts)):
        tl.store(x + i * C, parts[i], mask=mask)


@triton.jit
def show(x, mask, C: tl.constexpr, parts):
    """Store the parts of one tuple for the other lanes of the program to read."""
    tl.debug_barrier()  # Another lane may still be reading what was there.
    store(x, mask, C, parts)
    tl.debug_barrier()


@triton.jit
def agreed(agree, piece, inside, at, C: tl.constexpr, PIECES: tl.constexpr):
    """Whether all lanes of a channel have stored a positive number there: 1 or 0."""
    for m in tl.static_range(PIECES):
        agree = agree & (tl.load(at + m * 5 * C, mask=inside, other=1.0) > 0)
    return agree


@triton.jit
def absorb(a, b, o, n, w, count, exponent, p, q):
    """The state after a segment of count tokens, and the factors of old state and segment."""
    n += count
    gap = (o + n * w - exponent) * LOG2_E
    lesser, larger = tl.exp2(-tl.abs(gap)), gap < 0
    keep, add = tl.where(larger, lesser, 1.0), tl.where(larger, 1.0, lesser)
    o, n = tl.where(larger, exponent, o), tl.where(larger, 0.0, n)
    return a * keep + add * p, b * keep + add * q, o, n, keep, add


@triton.jit
def average(a, b, o, n, w, now, v):
    """y, the inverse of its denominator, and the factors of the past and of the present in both."""
    gap = (o + n * w - now) * LOG2_E
    lesser, larger = tl.exp2(-tl.abs(gap)), gap < 0
    past, present = tl.where(larger, lesser, 1.0), tl.where(larger, 1.0, lesser)
    inverse = 1.0 / tl.maximum(b * past + present, SMALLEST)
    return (a * past + present * v) * inverse, inverse, past, present


@triton.jit
def factor(o, n, w, exponent):
    """The factor from the frame e^{o + n w} to that of an exponent near it."""
    return tl.exp2(((o - exponent) + n * w) * LOG2_E)


@triton.jit
def settle(a, b, o, n, w):
    """The same state with n = 0. What rounding takes from the exponent goes into a and b."""
    exponent = o + n * w
    rest = factor(o, n, w, exponent)
    return a * rest, b * rest, exponent


@triton.jit
def forget(a, b, o, n, reset):
    """The state, of which nothing is left where reset is true, not even a NaN."""
    a, b = tl.where(reset, 0.0, a), tl.where(reset, 0.0, b)
    return a, b, tl.where(reset, ABSENT, o), tl.where(reset, 0.0, n)


@triton.jit
def divide(x, y, ROUGH: tl.constexpr):
    """x / y; ROUGH is faster, to two units in the last place if y is neither huge nor tiny."""
    return libdevice.fast_dividef(x, y) if ROUGH else x / y


@triton.jit
def pace_of(w, u, GROUP: tl.constexpr):
    """1 where the frame moves with the decay, and the decay and bonus that remain as factors.

    The frame moves with slow decays, so that numbers are kept exactly. A decay that would move it
    too far forgets numbers before their rounding errors matter.
    """
    pace = tl.where(GROUP * w >= -SLACK, 1.0, 0.0).to(w.dtype)
    return pace, tl.exp2((w - pace * w) * LOG2_E), tl.exp2((u + pace * w) * LOG2_E)


@triton.jit
def largest(k):
    """The largest key of a piece."""
    top = k[0]
    for j in tl.static_range(1, len(k)):
        top = tl.maximum(top, k[j])
    return top


@triton.jit
def weights_of(k, base, step):
    """e^k of tokens in the frame after each, which starts as e^base and moves by step."""
    weights = ()
    for j in tl.static_range(len(k)):
        weights = weights + (tl.exp2((k[j] - base) * LOG2_E - (j + 1) * (step * LOG2_E)),)
    return weights


@triton.jit
def scan(
    a, b, o, n, w, piece, inside, sums, C: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    CAREFUL: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The state before the lane's own piece, and that after the last one.

    All lanes of a channel go through the sums of its pieces, first to last, or BACK, last to first:
    a gradient that goes back is a state, too, whose exponents are those of the states, negated.
    """
    own_a, own_b, own_o, own_n = a, b, o, n
    for i in tl.static_range(PIECES):
        m = PIECES - 1 - i if BACK else i
        mine, at = piece == m, sums + m * 5 * C
        own_a, own_b = tl.where(mine, a, own_a), tl.where(mine, b, own_b)
        own_o, own_n = tl.where(mine, o, own_o), tl.where(mine, n, own_n)
        p, q = tl.load(at, mask=inside, other=0.0), tl.load(at + C, mask=inside, other=0.0)
        exponent = tl.load(at + 2 * C, mask=inside, other=0.0)
        count = GROUP
        if CAREFUL:
            count = tl.load(at + 3 * C, mask=inside, other=0.0)
            a, b, o, n = forget(a, b, o, n, count < 0)
            count = tl.maximum(count, 0.0)
        a, b, o, n, keep, add = absorb(a, b, o, n, w, count, exponent, p, q)
    return own_a, own_b, own_o, own_n, a, b, o, n
