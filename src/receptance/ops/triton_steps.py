"""The parts of a decoding step of RWKV-4 besides its plain products, each in one launch."""
# mypy: disable-error-code="no-untyped-def"
# Triton gives the annotations of kernels a meaning of its own.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.triton_products import Tiles, places_of, sums_of
from receptance.ops.triton_weights import Weights, weight_at

Norm = tuple[Tensor, Tensor, float]
"""Weight and bias [C] of a layer norm, and its epsilon."""

_WARPS = 8


@triton.jit
def _layer_norm(x, weight, bias, c, real, width, epsilon):
    """The layer norm of one row, which the program holds whole."""
    centered = tl.where(real, x - tl.sum(x, 0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 0) / width + epsilon)
    return centered * scale * tl.load(weight + c, real, 0) + tl.load(bias + c, real, 0)


@triton.jit
def _embed_kernel(
    data, scale, minimum, tokens, norm_weight, norm_bias, out, vocabulary, width, epsilon,
    KIND: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    token = tl.load(tokens + b)
    known = (token >= 0) & (token < vocabulary)
    token = tl.where(known, token, 0)
    x = weight_at(data, scale, minimum, token, c, width, c < width, KIND, GROUP)
    # Nobody has checked the ids, so an id that is no token makes its own row NaN, and no other.
    x = tl.where(known, x, float("nan"))
    normal = _layer_norm(x, norm_weight, norm_bias, c, c < width, width, epsilon)
    tl.store(out + b * width + c, normal, c < width)


@triton.jit
def _mix_kernel(
    x, norm_weight, norm_bias, shift, shares, out, batch, width, epsilon,
    MIXES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    real, place = c < width, b * width + c
    row = tl.load(x + place, real, 0)
    normal = _layer_norm(row, norm_weight, norm_bias, c, real, width, epsilon)
    if MIXES == 0:
        tl.store(out + place, normal, real)
    else:
        before = tl.load(shift + place, real, 0)
        tl.debug_barrier()  # For the same reason as in _average.
        tl.store(shift + place, normal, real)
        for i in tl.static_range(MIXES):
            share = tl.load(shares + i * width + c, real, 0)
            mixed = before + share * (normal - before)
            tl.store(out + tl.cast(batch, tl.int64) * width * i + place, mixed, real)


@triton.jit
def _average(
    key, value, receptance, decay, bonus, numerator, denominator, exponent, out, place, real
):
    """Equations 16 and 23 to 28 for one token, times the sigmoid of the receptance."""
    a, b = tl.load(numerator + place, real, 0), tl.load(denominator + place, real, 0)
    o = tl.load(exponent + place, real, 0)
    # Several threads may read one number, so all of them have to do so before one writes.
    tl.debug_barrier()
    now = key + bonus
    top = tl.maximum(o, now)
    old, new = tl.exp(o - top), tl.exp(now - top)
    average = (a * old + new * value) / (b * old + new)
    tl.store(out + place, average / (1 + tl.exp(-receptance)), real)
    o += decay
    top = tl.maximum(o, key)
    old, new = tl.exp(o - top), tl.exp(key - top)
    tl.store(numerator + place, a * old + new * value, real)
    tl.store(denominator + place, b * old + new, real)
    tl.store(exponent + place, top, real)


@triton.jit
def _average_kernel(
    projected, decay, bonus, numerator, denominator, exponent, out, size, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < size
    key = tl.load(projected + place, real, 0)
    value = tl.load(projected + size + place, real, 0)
    receptance = tl.load(projected + tl.cast(size, tl.int64) * 2 + place, real, 0)
    decay = tl.load(decay + place % width, real, 0)
    bonus = tl.load(bonus + place % width, real, 0)
    _average(key, value, receptance, decay, bonus, numerator, denominator, exponent, out, place,
             real)  # fmt: skip


@triton.jit
def _time_mix_kernel(
    data, scale, minimum, x, decay, bonus, numerator, denominator, exponent, out, batch,
    WIDTH: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BATCH: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Only this program needs its channels of key, value and receptance: they stay in registers."""
    start = tl.program_id(0) * ROWS
    n = start + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    size, left = tl.cast(batch, tl.int64) * WIDTH, WIDTH - start
    key = sums_of(data, scale, minimum, x, start, left, b, batch, WIDTH,
                  KIND, GROUP, ROWS, BATCH, WARPS, INTERPRETED)  # fmt: skip
    value = sums_of(data, scale, minimum, x + size, WIDTH + start, left, b, batch, WIDTH,
                    KIND, GROUP, ROWS, BATCH, WARPS, INTERPRETED)  # fmt: skip
    receptance = sums_of(data, scale, minimum, x + size * 2, 2 * WIDTH + start, left, b, batch,
                         WIDTH, KIND, GROUP, ROWS, BATCH, WARPS, INTERPRETED)  # fmt: skip
    place, real = places_of(n, b, WIDTH, batch, BATCH)
    decay, bonus = tl.load(decay + n, n < WIDTH, 0), tl.load(bonus + n, n < WIDTH, 0)
    if BATCH > 1:
        decay, bonus = decay[:, None], bonus[:, None]
    _average(key, value, receptance, decay, bonus, numerator, denominator, exponent, out, place,
             real)  # fmt: skip


def embed(weights: Weights, tokens: Tensor, norm: Norm, out: Tensor) -> None:
    """The layer norm of the embedding's rows: [B] int64 -> out [B,C]; NaN where an id is none."""
    weight, bias, epsilon = norm
    _embed_kernel[(len(tokens),)](
        *weights.arguments(), tokens, weight, bias, out, weights.outputs, weights.inputs, epsilon,
        *weights.form, triton.next_power_of_2(weights.inputs),
        num_warps=_WARPS,
    )  # fmt: skip


def mix(x: Tensor, norm: Norm, shift: Tensor, shares: Tensor, out: Tensor) -> None:
    """Layer norm of x [B,C], mixed with its predecessor in `shift` [B,C], whose place it takes.

    shares [M,C] gives out [M,B,C]; with none, out [B,C] is the norm, and shift is left alone.
    """
    (batch, width), (weight, bias, epsilon) = x.shape, norm
    _mix_kernel[(batch,)](
        x, weight, bias, shift, shares, out, batch, width, epsilon, len(shares),
        triton.next_power_of_2(width), num_warps=_WARPS,
    )  # fmt: skip


def average(
    projected: Tensor, decay: Tensor, bonus: Tensor, state: tuple[Tensor, ...], out: Tensor
) -> None:
    """One token of WKV, gated: key, value, receptance [3,B,C] -> out [B,C]. Updates the state.

    decay [C] is -exp(time_decay), state numerator, denominator, exponent, each [B,C].
    """
    size, block = out.numel(), 256
    _average_kernel[(triton.cdiv(size, block),)](
        projected, decay, bonus, *state, out, size, out.shape[-1], block, num_warps=2
    )


def time_mix(
    weights: Weights,
    x: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: tuple[Tensor, ...],
    out: Tensor,
    *,
    tiles: Tiles | None = None,
) -> None:
    """The same from what key, value and receptance read: x [3,B,C] -> out [B,C], in one launch."""
    tiles, (batch, width) = tiles or Tiles(), x.shape[1:]
    rows, block, sizes = tiles.launch(weights, batch)
    _time_mix_kernel[(triton.cdiv(width, rows), triton.cdiv(batch, block))](
        *weights.arguments(), x, decay, bonus, *state, out, batch, width, *weights.form,
        rows, block, sizes["num_warps"], not x.is_cuda, **sizes,
    )  # fmt: skip
