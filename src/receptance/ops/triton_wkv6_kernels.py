"""WKV-6 for GPUs: the kernels. Importing this imports triton.

They have the borders of wkv6_chunked, whose docstring has the formulas and the names, but not its
halves: inside a chunk each position in turn, the last first, meets all later ones, and the sums of
log_decay between them are carried along. So no sum is a difference, and no factor is above 1.
A program takes a head of a row of the batch, and either one chunk, or some columns of the state,
which it follows through all chunks.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the arguments their types.

import triton
import triton.language as tl

from receptance.ops.triton_chunks import documents, load, store, times, tokens


@triton.jit
def _before(
    log_decay, token, column, inside, H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr
):
    """The decay from the start of a chunk to every position, whose own acts later."""
    w = load(log_decay - H * N, token, (tl.arange(0, CHUNK) > 0) & inside, column)
    return tl.exp(tl.cumsum(w, 0))


@triton.jit
def _after(log_decay, token, column, left, H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr):
    """The decay from every position, whose own has acted, to the end of a chunk."""
    n = tl.arange(0, CHUNK) + 1
    w = load(log_decay + H * N, token, n < tl.minimum(left, CHUNK), column)
    return tl.exp(tl.cumsum(w, 0, reverse=True))


@triton.jit
def _row(x, head, position, column, T, H: tl.constexpr, N: tl.constexpr):
    """The vector of one position [1,N], float32; zero beyond the end."""
    at = ((head // H * T + position) * H + head % H) * N + column
    return tl.load(x + at, mask=column * 0 + position < T, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _seen(products, document, CHUNK: tl.constexpr):
    """Products of positions with earlier ones of their document; zero elsewhere."""
    n = tl.arange(0, CHUNK)
    seen = (n[:, None] > n[None, :]) & (document[:, None] == document[None, :])
    return tl.where(seen, products, 0.0)


# ---- forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def states(
    log_decay, key, value, resets, state, starts, after, T,
    H: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The states before every chunk, and the one after the last token."""
    head, size = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * N * N
    column, part = tl.arange(0, N), tl.program_id(1) * PART + tl.arange(0, PART)
    cell = head * N * N + column[:, None] * N + part[None, :]
    s = tl.load(state + cell)
    for chunk in range(0, tl.cdiv(T, CHUNK)):
        tl.store(starts + chunk * size + cell, s)
        token, inside = tokens(head, chunk * CHUNK, T, H, N, CHUNK)
        document, last = documents(resets, head, chunk * CHUNK, T, H, CHUNK)
        fade = _after(log_decay, token, column, T - chunk * CHUNK, H, N, CHUNK)
        k = load(key, token, inside, column) * tl.where((document == last)[:, None], fade, 0.0)
        keep = tl.exp(tl.sum(load(log_decay, token, inside, column), 0))
        s *= tl.where(last == 0, keep, 0.0)[:, None]
        s += times(tl.trans(k), load(value, token, inside, part))
    tl.store(after + cell, s)


@triton.jit(do_not_specialize=["T"])
def outputs(
    receptance, log_decay, key, value, bonus, resets, starts, out, T,
    H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The outputs [B,T,H,N] of one chunk."""
    head, first, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK, tl.arange(0, N)
    cell = (tl.program_id(1) * tl.num_programs(0) + head) * N * N
    s = tl.load(starts + cell + column[:, None] * N + column[None, :])
    token, inside = tokens(head, first, T, H, N, CHUNK)
    document, _ = documents(resets, head, first, T, H, CHUNK)
    n = tl.arange(0, CHUNK)
    r, v = load(receptance, token, inside, column), load(value, token, inside, column)
    fade = _before(log_decay, token, column, inside, H, N, CHUNK)
    y = times(r * tl.where((document == 0)[:, None], fade, 0.0), s)

    gap = tl.zeros((CHUNK, N), tl.float32)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for back in range(0, CHUNK - 1):
        i = CHUNK - 2 - back
        gap += _row(log_decay, head, first + i + 1, column, T, H, N)
        gap = tl.where(n[:, None] > i + 1, gap, 0.0)
        k = _row(key, head, first + i, column, T, H, N)
        read = tl.sum(r * k * tl.exp(gap), 1)[:, None]
        weights = tl.where(n[None, :] == i, read, weights)
    y += times(_seen(weights, document, CHUNK), v)
    u = tl.load(bonus + head % H * N + column)[None, :]
    y += tl.sum(r * u * load(key, token, inside, column), 1)[:, None] * v
    store(out, token, inside, column, y)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def states_backward(
    grad_out, receptance, log_decay, resets, grad_state, ends, before, T,
    H: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients of the states after every chunk, and of the first state."""
    head, size = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * N * N
    column, part = tl.arange(0, N), tl.program_id(1) * PART + tl.arange(0, PART)
    cell = head * N * N + column[:, None] * N + part[None, :]
    grad = tl.load(grad_state + cell)
    for back in range(0, tl.cdiv(T, CHUNK)):
        chunk = tl.cdiv(T, CHUNK) - 1 - back
        tl.store(ends + chunk * size + cell, grad)
        token, inside = tokens(head, chunk * CHUNK, T, H, N, CHUNK)
        document, last = documents(resets, head, chunk * CHUNK, T, H, CHUNK)
        fade = _before(log_decay, token, column, inside, H, N, CHUNK)
        r = load(receptance, token, inside, column)
        r *= tl.where((document == 0)[:, None], fade, 0.0)
        keep = tl.exp(tl.sum(load(log_decay, token, inside, column), 0))
        grad *= tl.where(last == 0, keep, 0.0)[:, None]
        grad += times(tl.trans(r), load(grad_out, token, inside, part))
    tl.store(before + cell, grad)


@triton.jit(do_not_specialize=["T"])
def borders_backward(
    grad_out, receptance, log_decay, key, value, resets, starts, ends,
    grad_receptance, grad_log_decay, grad_key, grad_value, T,
    H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients in one chunk of what meets the states before and after it.

    A factor e^g gives g the product of what it multiplies with the gradient of that, and g is the
    sum of log_decay between a position and a border.
    """
    head, first, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK, tl.arange(0, N)
    cell = (tl.program_id(1) * tl.num_programs(0) + head) * N * N
    cell += column[:, None] * N + column[None, :]
    token, inside = tokens(head, first, T, H, N, CHUNK)
    document, last = documents(resets, head, first, T, H, CHUNK)
    n = tl.arange(0, CHUNK)
    later = tl.where(n[:, None] < n[None, :], 1.0, 0.0)

    s = tl.load(starts + cell)
    fade = _before(log_decay, token, column, inside, H, N, CHUNK)
    r = times(load(grad_out, token, inside, column), tl.trans(s))
    r *= tl.where((document == 0)[:, None], fade, 0.0)
    store(grad_receptance, token, inside, column, r)
    w = times(later, r * load(receptance, token, inside, column))

    grad = tl.load(ends + cell)
    keep = tl.exp(tl.sum(load(log_decay, token, inside, column), 0))
    w += (tl.sum(grad * s, 1) * tl.where(last == 0, keep, 0.0))[None, :]
    fade = _after(log_decay, token, column, T - first, H, N, CHUNK)
    fade = tl.where((document == last)[:, None], fade, 0.0)
    raw = load(key, token, inside, column)
    k = times(load(value, token, inside, column), tl.trans(grad)) * fade
    store(grad_key, token, inside, column, k)
    w += times(tl.trans(later), k * raw)
    store(grad_log_decay, token, inside, column, w)
    store(grad_value, token, inside, column, times(raw * fade, grad))


@triton.jit(do_not_specialize=["T"])
def pairs_backward(
    grad_out, receptance, log_decay, key, value, bonus, resets, at_borders_r, at_borders_k,
    at_borders_v, grad_receptance, grad_log_decay, grad_key, grad_value, grad_bonus, T,
    H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients in one chunk: those at its borders [B,T,H,N], and those of its pairs.

    grad_log_decay has those at the borders before. grad_bonus [K,B,H,N] is of the chunk alone.
    """
    head, first, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK, tl.arange(0, N)
    token, inside = tokens(head, first, T, H, N, CHUNK)
    document, _ = documents(resets, head, first, T, H, CHUNK)
    n = tl.arange(0, CHUNK)
    r, y = load(receptance, token, inside, column), load(grad_out, token, inside, column)
    v = load(value, token, inside, column)
    read = _seen(times(y, tl.trans(v)), document, CHUNK)
    later = tl.where(n[:, None] < n[None, :], 1.0, 0.0)

    of_r = load(at_borders_r, token, inside, column)
    of_k = load(at_borders_k, token, inside, column)
    of_w = load(grad_log_decay, token, inside, column)
    gap = tl.zeros((CHUNK, N), tl.float32)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for back in range(0, CHUNK - 1):
        i = CHUNK - 2 - back
        gap += _row(log_decay, head, first + i + 1, column, T, H, N)
        gap = tl.where(n[:, None] > i + 1, gap, 0.0)
        k = _row(key, head, first + i, column, T, H, N)
        fade = tl.exp(gap)
        weights = tl.where(n[None, :] == i, tl.sum(r * k * fade, 1)[:, None], weights)
        fade *= tl.sum(tl.where(n[None, :] == i, read, 0.0), 1)[:, None]
        of_r += fade * k
        fade *= r
        of_k += tl.where(n[:, None] == i, tl.sum(fade, 0)[None, :], 0.0)
        of_w += tl.where(n[:, None] > i, times(later, fade * k), 0.0)
    store(grad_log_decay, token, inside, column, of_w)

    along, k = tl.sum(y * v, 1)[:, None], load(key, token, inside, column)
    u = tl.load(bonus + head % H * N + column)[None, :]
    store(grad_receptance, token, inside, column, of_r + along * u * k)
    store(grad_key, token, inside, column, of_k + along * u * r)
    cell = (tl.program_id(1) * tl.num_programs(0) + head) * N
    tl.store(grad_bonus + cell + column, tl.sum(along * r * k, 0))
    v = times(tl.trans(_seen(weights, document, CHUNK)), y)
    v += tl.sum(r * u * k, 1)[:, None] * y + load(at_borders_v, token, inside, column)
    store(grad_value, token, inside, column, v)
