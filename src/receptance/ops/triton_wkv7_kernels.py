"""WKV-7 for GPUs: the kernels. Importing this imports triton.

They are the matrix form of wkv7_chunked, whose docstring has the formulas and the names. A program
takes a head of a row of the batch, and either one chunk, with products of its positions, or some
rows of the state, which it follows through all chunks. These depend on nothing of one another.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the arguments their types.

import triton
import triton.language as tl

from receptance.ops.triton_chunks import documents, load, store, times, tokens


@triton.jit
def _seen(x, y, document, NOW: tl.constexpr, CHUNK: tl.constexpr):
    """x y^T for positions and earlier ones of their document, with NOW themselves; else zero."""
    n = tl.arange(0, CHUNK)
    seen = (n[:, None] > n[None, :]) | ((n[:, None] == n[None, :]) & NOW)
    seen = seen & (document[:, None] == document[None, :])
    return tl.where(seen, times(x, tl.trans(y)), 0.0)


@triton.jit
def _inverse(below, CHUNK: tl.constexpr):
    """The inverse of 1 - below, a strictly lower triangular matrix, row after row."""
    n = tl.arange(0, CHUNK)
    inverse = tl.where(n[:, None] == n[None, :], 1.0, 0.0)
    for i in range(1, CHUNK):
        row = tl.sum(tl.where(n[:, None] == i, below, 0.0), 0)
        row = tl.sum(row[:, None] * inverse, 0)
        inverse += tl.where(n[:, None] == i, row[None, :], 0.0)
    return inverse


# ---- forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def solve(
    log_decay, key, value, removal, replacement, resets, starts, through, u, T,
    H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """U = u + through S^T for the state S before a chunk: both [B,T,H,N]. With starts, u is U."""
    head, first, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK, tl.arange(0, N)
    token, inside = tokens(head, first, T, H, N, CHUNK)
    document, _ = documents(resets, head, first, T, H, CHUNK)
    w = load(log_decay, token, inside, column)
    g = tl.cumsum(w, 0)
    a = load(removal, token, inside, column) * tl.exp(g - w)
    b = load(replacement, token, inside, column) * tl.exp(-g)
    inverse = _inverse(_seen(a, b, document, False, CHUNK), CHUNK)
    k = load(key, token, inside, column) * tl.exp(-g)
    ak = times(inverse, _seen(a, k, document, False, CHUNK))
    x = times(ak, load(value, token, inside, column))
    a = times(inverse, tl.where((document == 0)[:, None], a, 0.0))
    if starts is None:
        store(through, token, inside, column, a)
    else:
        cell = (tl.program_id(1) * tl.num_programs(0) + head) * N * N
        s = tl.load(starts + cell + column[:, None] * N + column[None, :])
        x += times(a, tl.trans(s))
    store(u, token, inside, column, x)


@triton.jit(do_not_specialize=["T"])
def states(
    log_decay, key, value, replacement, resets, through, u, state, starts, after, T,
    H: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The states before every chunk, and the one after the last token; u becomes U."""
    head, size = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * N * N
    column, row = tl.arange(0, N), tl.program_id(1) * PART + tl.arange(0, PART)
    cell = head * N * N + row[:, None] * N + column[None, :]
    s = tl.load(state + cell)
    for chunk in range(0, tl.cdiv(T, CHUNK)):
        tl.store(starts + chunk * size + cell, s)
        token, inside = tokens(head, chunk * CHUNK, T, H, N, CHUNK)
        document, last = documents(resets, head, chunk * CHUNK, T, H, CHUNK)
        reaches_end = (document == last)[:, None]
        w = load(log_decay, token, inside, column)
        total = tl.sum(w, 0)[None, :]
        to_end = tl.where(reaches_end, tl.exp(total - tl.cumsum(w, 0)), 0.0)
        x = load(u, token, inside, row)
        x += times(load(through, token, inside, column), tl.trans(s))
        store(u, token, inside, row, x)
        s *= tl.where(last == 0, tl.exp(total), 0.0)
        s += times(tl.trans(x), load(replacement, token, inside, column) * to_end)
        v = load(value, token, inside, row)
        s += times(tl.trans(v), load(key, token, inside, column) * to_end)
    tl.store(after + cell, s)


@triton.jit(do_not_specialize=["T"])
def outputs(
    receptance, log_decay, key, value, replacement, resets, u, starts, out, T,
    H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The outputs [B,T,H,N] of one chunk."""
    head, first, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK, tl.arange(0, N)
    cell = (tl.program_id(1) * tl.num_programs(0) + head) * N * N
    s = tl.load(starts + cell + column[:, None] * N + column[None, :])
    token, inside = tokens(head, first, T, H, N, CHUNK)
    document, _ = documents(resets, head, first, T, H, CHUNK)
    g = tl.cumsum(load(log_decay, token, inside, column), 0)
    r = load(receptance, token, inside, column) * tl.exp(g)
    y = times(tl.where((document == 0)[:, None], r, 0.0), tl.trans(s))
    b = load(replacement, token, inside, column) * tl.exp(-g)
    y += times(_seen(r, b, document, True, CHUNK), load(u, token, inside, column))
    k = load(key, token, inside, column) * tl.exp(-g)
    y += times(_seen(r, k, document, True, CHUNK), load(value, token, inside, column))
    store(out, token, inside, column, y)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def solve_backward(
    grad_out, receptance, log_decay, removal, replacement, resets, through, z, T,
    H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Z = z + through G^T for the gradient G of the state after a chunk: both [B,T,H,N].

    Z is the gradient of the right side of the triangular system.
    """
    head, first, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK, tl.arange(0, N)
    token, inside = tokens(head, first, T, H, N, CHUNK)
    document, last = documents(resets, head, first, T, H, CHUNK)
    w = load(log_decay, token, inside, column)
    g = tl.cumsum(w, 0)
    a = load(removal, token, inside, column) * tl.exp(g - w)
    b = load(replacement, token, inside, column) * tl.exp(-g)
    inverse = tl.trans(_inverse(_seen(a, b, document, False, CHUNK), CHUNK))
    b_end = tl.where((document == last)[:, None], b * tl.exp(tl.sum(w, 0))[None, :], 0.0)
    store(through, token, inside, column, times(inverse, b_end))
    r = load(receptance, token, inside, column) * tl.exp(g)
    rb = times(inverse, tl.trans(_seen(r, b, document, True, CHUNK)))
    store(z, token, inside, column, times(rb, load(grad_out, token, inside, column)))


@triton.jit(do_not_specialize=["T"])
def states_backward(
    grad_out, receptance, log_decay, removal, resets, through, z, grad_state, ends, before, T,
    H: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients of the states after every chunk, and of the first state; z becomes Z."""
    head, size = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * N * N
    column, row = tl.arange(0, N), tl.program_id(1) * PART + tl.arange(0, PART)
    cell = head * N * N + row[:, None] * N + column[None, :]
    grad = tl.load(grad_state + cell)
    for back in range(0, tl.cdiv(T, CHUNK)):
        chunk = tl.cdiv(T, CHUNK) - 1 - back
        tl.store(ends + chunk * size + cell, grad)
        token, inside = tokens(head, chunk * CHUNK, T, H, N, CHUNK)
        document, last = documents(resets, head, chunk * CHUNK, T, H, CHUNK)
        sees_start = (document == 0)[:, None]
        w = load(log_decay, token, inside, column)
        g = tl.cumsum(w, 0)
        x = load(z, token, inside, row)
        x += times(load(through, token, inside, column), tl.trans(grad))
        store(z, token, inside, row, x)
        grad *= tl.where(last == 0, tl.exp(tl.sum(w, 0))[None, :], 0.0)
        a = load(removal, token, inside, column) * tl.where(sees_start, tl.exp(g - w), 0.0)
        grad += times(tl.trans(x), a)
        r = load(receptance, token, inside, column) * tl.where(sees_start, tl.exp(g), 0.0)
        grad += times(tl.trans(load(grad_out, token, inside, row)), r)
    tl.store(before + cell, grad)


@triton.jit(do_not_specialize=["T"])
def readers_backward(
    grad_out, receptance, log_decay, key, value, removal, replacement, resets, u, z, starts,
    grad_receptance, grad_log_decay, grad_removal, T,
    H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients of what reads the state, in one chunk; and their part of log_decay's.

    A factor e^g gives g the product of what it multiplies with the gradient of that, and log_decay
    is part of the g of its position and of all later ones.
    """
    head, first, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK, tl.arange(0, N)
    cell = (tl.program_id(1) * tl.num_programs(0) + head) * N * N
    s = tl.load(starts + cell + column[:, None] * N + column[None, :])
    token, inside = tokens(head, first, T, H, N, CHUNK)
    document, _ = documents(resets, head, first, T, H, CHUNK)
    sees_start = (document == 0)[:, None]
    w, n = load(log_decay, token, inside, column), tl.arange(0, CHUNK)
    g = tl.cumsum(w, 0)
    b = load(replacement, token, inside, column) * tl.exp(-g)
    k = load(key, token, inside, column) * tl.exp(-g)
    u, v = load(u, token, inside, column), load(value, token, inside, column)

    y = load(grad_out, token, inside, column)
    r = tl.where(sees_start, times(y, s), 0.0)
    r += times(_seen(y, u, document, True, CHUNK), b)
    r = (r + times(_seen(y, v, document, True, CHUNK), k)) * tl.exp(g)
    store(grad_receptance, token, inside, column, r)
    later = tl.where(n[:, None] <= n[None, :], 1.0, 0.0)
    along = times(later, r * load(receptance, token, inside, column))

    z = load(z, token, inside, column)
    a = tl.where(sees_start, times(z, s), 0.0)
    a += times(_seen(z, u, document, False, CHUNK), b)
    a = (a + times(_seen(z, v, document, False, CHUNK), k)) * tl.exp(g - w)
    store(grad_removal, token, inside, column, a)
    later = tl.where(n[:, None] < n[None, :], 1.0, 0.0)
    along += times(later, a * load(removal, token, inside, column))
    store(grad_log_decay, token, inside, column, along)


@triton.jit(do_not_specialize=["T"])
def writers_backward(
    grad_out, receptance, log_decay, key, value, removal, replacement, resets, u, z, starts, ends,
    grad_log_decay, grad_key, grad_value, grad_replacement, T,
    H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients of what is written to the state, in one chunk; and the rest of log_decay's."""
    head, first, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK, tl.arange(0, N)
    cell = (tl.program_id(1) * tl.num_programs(0) + head) * N * N
    cell += column[:, None] * N + column[None, :]
    grad_end = tl.load(ends + cell)
    token, inside = tokens(head, first, T, H, N, CHUNK)
    document, last = documents(resets, head, first, T, H, CHUNK)
    w, n = load(log_decay, token, inside, column), tl.arange(0, CHUNK)
    g, total = tl.cumsum(w, 0), tl.sum(w, 0)[None, :]
    # What is written reaches the end of the chunk as it is times this, and all later positions as
    # it is times e^{-g}.
    to_end = tl.where((document == last)[:, None], tl.exp(total - g), 0.0)
    r = load(receptance, token, inside, column) * tl.exp(g)
    a = load(removal, token, inside, column) * tl.exp(g - w)
    y, z = load(grad_out, token, inside, column), load(z, token, inside, column)

    at_end = tl.sum(grad_end * tl.load(starts + cell), 0)[None, :]
    at_end = tl.where(last == 0, at_end * tl.exp(total), 0.0)
    u, raw = load(u, token, inside, column), load(replacement, token, inside, column)
    ended = times(u, grad_end) * to_end
    at_end += tl.sum(ended * raw, 0)[None, :]
    b = times(tl.trans(_seen(y, u, document, True, CHUNK)), r)
    b += times(tl.trans(_seen(z, u, document, False, CHUNK)), a)
    b = b * tl.exp(-g) + ended
    store(grad_replacement, token, inside, column, b)
    along = b * raw

    v, raw = load(value, token, inside, column), load(key, token, inside, column)
    ended = times(v, grad_end) * to_end
    at_end += tl.sum(ended * raw, 0)[None, :]
    k = times(tl.trans(_seen(y, v, document, True, CHUNK)), r)
    k += times(tl.trans(_seen(z, v, document, False, CHUNK)), a)
    k = k * tl.exp(-g) + ended
    store(grad_key, token, inside, column, k)
    along += k * raw

    later = tl.where(n[:, None] <= n[None, :], 1.0, 0.0)
    along = load(grad_log_decay, token, inside, column) + at_end - times(later, along)
    store(grad_log_decay, token, inside, column, along)

    k, v = raw * tl.exp(-g), times(raw * to_end, tl.trans(grad_end))
    v += times(tl.trans(_seen(r, k, document, True, CHUNK)), y)
    v += times(tl.trans(_seen(a, k, document, False, CHUNK)), z)
    store(grad_value, token, inside, column, v)
