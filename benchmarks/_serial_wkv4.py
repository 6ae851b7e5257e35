"""What gpu_wkv4.py compares with: WKV-4 with one thread per channel that walks over all of T.

Structured like the CUDA kernels that were published with RWKV-4: nothing is parallel over time,
and the backward pass keeps a few floats for every token of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32


@triton.jit
def _advance(a, b, o, w, k, v):  # type: ignore[no-untyped-def]
    top = tl.maximum(o + w, k)
    keep, add = tl.exp(o + w - top), tl.exp(k - top)
    return a * keep + add * v, b * keep + add, top, keep, add


@triton.jit
def _output(a, b, o, now, v):  # type: ignore[no-untyped-def]
    top = tl.maximum(o, now)
    past, present = tl.exp(o - top), tl.exp(now - top)
    denominator = b * past + present
    return (a * past + present * v) / denominator, denominator, past, present


@triton.jit
def _forward(log_decay, bonus, key, value, out, T, C, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at = c < C, tl.program_id(1).to(tl.int64) * T * C + c
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    u = tl.load(bonus + c, mask=inside, other=0.0)
    a, b, o = w * 0, w * 0, w * 0 - 1e30
    for _t in range(0, T):
        k = tl.load(key + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
        y, denominator, past, present = _output(a, b, o, u + k, v)  # noqa: RUF059
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
        a, b, o, keep, add = _advance(a, b, o, w, k, v)  # noqa: RUF059
        at += C


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    log_decay, bonus, key, value, grad_out, states, vectors, grad_key, grad_value, T, C,
    BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside, at, kept = c < C, row * T * C + c, states + (row * T * 3 * C + c)
    w = tl.load(log_decay + c, mask=inside, other=0.0)
    u = tl.load(bonus + c, mask=inside, other=0.0)
    a, b, o = w * 0, w * 0, w * 0 - 1e30
    for _t in range(0, T):
        tl.store(kept, a, mask=inside)
        tl.store(kept + C, b, mask=inside)
        tl.store(kept + 2 * C, o, mask=inside)
        k = tl.load(key + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
        a, b, o, keep, add = _advance(a, b, o, w, k, v)
        at, kept = at + C, kept + 3 * C
    ga, gb, grad_decay, grad_bonus = w * 0, w * 0, w * 0, w * 0
    for _t in range(0, T):
        at, kept = at - C, kept - 3 * C
        a = tl.load(kept, mask=inside, other=0.0)
        b = tl.load(kept + C, mask=inside, other=0.0)
        o = tl.load(kept + 2 * C, mask=inside, other=0.0)
        k = tl.load(key + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        y, denominator, past, present = _output(a, b, o, u + k, v)
        after_a, after_b, after_o, keep, add = _advance(a, b, o, w, k, v)  # noqa: RUF059
        q = g / denominator
        own = present * q * (v - y)
        grad_bonus += own
        grad_decay += keep * (ga * a + gb * b)
        dk, dv = own + add * (ga * v + gb), present * q + add * ga
        tl.store(grad_key + at, dk.to(grad_key.dtype.element_ty), mask=inside)
        tl.store(grad_value + at, dv.to(grad_value.dtype.element_ty), mask=inside)
        ga, gb = keep * ga + past * q, keep * gb - y * past * q
    tl.store(vectors + (row * 2 * C + c), grad_decay, mask=inside)
    tl.store(vectors + (row * 2 * C + C + c), grad_bonus, mask=inside)


def forward(log_decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Output [B,T,C] from a fresh state."""
    batch, time, width = key.shape
    out = torch.empty_like(value)
    grid = (triton.cdiv(width, BLOCK), batch)
    _forward[grid](log_decay, bonus, key, value, out, time, width, BLOCK=BLOCK, num_warps=1)
    return out


def backward(
    grad_out: Tensor, log_decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_decay, bonus, key, value."""
    batch, time, width = key.shape
    states = torch.empty(batch, time, 3, width, device=key.device)
    vectors = torch.empty(batch, 2, width, device=key.device)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    tensors = (log_decay, bonus, key, value, grad_out, states, vectors, grad_key, grad_value)
    grid = (triton.cdiv(width, BLOCK), batch)
    _backward[grid](*tensors, time, width, BLOCK=BLOCK, num_warps=1)
    grad_decay, grad_bonus = vectors.sum(0)
    return grad_decay, grad_bonus, grad_key, grad_value
