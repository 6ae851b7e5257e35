"""WKV-6 in C++ for CPUs (sources in receptance/native): float32, bfloat16 and float64.

A state is 64 numbers for every channel, so the forward pass keeps one only for every CHUNK tokens,
and the backward pass recomputes those between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.ops.arguments import Wkv6BackwardInputs, Wkv6Gradients, Wkv6Inputs, Wkv6Results
from receptance.ops.native import call, inner_dtype, masks
from receptance.ops.threads import usable_threads

CHUNK = 32  # It equals kWkv6Chunk in wkv6.h.

# A call with fewer numbers of states to compute than this is over before other threads have woken
# up: some 20 microseconds of work.
_SERIAL_NUMBERS = 1 << 17


def kept_states(time: int) -> int:
    """How many states forward keeps: one before every chunk."""
    return -(-time // CHUNK)


def forward(x: Wkv6Inputs, instruction_set: str = "") -> Wkv6Results:
    """Output [B,T,H,N], the final state [B,H,N,N], chunk starts [K,B,H,N,N]."""
    batch, time, heads, size = x.key.shape
    dtype, inner, wide = x.value.dtype, inner_dtype(x.value.dtype), x.state.dtype
    out = torch.empty(x.key.shape, dtype=inner)
    state = torch.empty(batch, heads, size, size, dtype=wide)
    starts = torch.empty(kept_states(time), batch, heads, size, size, dtype=wide)
    inputs = [
        x.receptance.to(inner).contiguous(),
        x.log_decay.contiguous(),
        x.key.to(inner).contiguous(),
        x.value.to(inner).contiguous(),
        x.bonus.contiguous(),
        x.state.contiguous(),
        *masks(x.resets, x.lengths, time),
    ]
    _call("wkv6_forward", x.key.shape, inner, instruction_set, [*inputs, out, state, starts])
    return out.to(dtype), state, starts


def backward(x: Wkv6BackwardInputs, instruction_set: str = "") -> Wkv6Gradients:
    """Gradients of receptance, log_decay, key, value, bonus and state."""
    batch, time, heads, size = x.key.shape
    dtype, inner, wide = x.key.dtype, inner_dtype(x.key.dtype), x.log_decay.dtype
    inputs = [
        x.grad_out.to(inner).contiguous(),
        x.grad_state.contiguous(),
        x.receptance.to(inner).contiguous(),
        x.log_decay.contiguous(),
        x.key.to(inner).contiguous(),
        x.value.to(inner).contiguous(),
        x.bonus.contiguous(),
        x.starts.contiguous(),
        *masks(x.resets, x.lengths, time),
    ]
    receptance, key, value = (torch.empty(x.key.shape, dtype=inner) for _ in range(3))
    log_decay = torch.empty(x.key.shape, dtype=wide)
    bonus = torch.empty(batch, heads, size, dtype=torch.float64)
    state = torch.empty(x.grad_state.shape, dtype=x.grad_state.dtype)
    outputs = [receptance, log_decay, key, value, bonus, state]
    _call("wkv6_backward", x.key.shape, inner, instruction_set, [*inputs, *outputs])
    receptance, key, value = (part.to(dtype) for part in (receptance, key, value))
    return receptance, log_decay, key, value, bonus.sum(0).to(x.bonus.dtype), state


def _call(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    instruction_set: str,
    tensors: list[Tensor | None],
) -> None:
    few = shape.numel() * shape[-1] < _SERIAL_NUMBERS
    threads = 1 if few else usable_threads()
    call(name, shape, dtype, tensors, threads=threads, instruction_set=instruction_set)
