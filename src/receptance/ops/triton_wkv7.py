"""WKV-7 on GPUs: how its Triton kernels are launched.

They do what the matrix form of wkv7_chunked does, which stays in charge of everything else: rows
that have ended, decays that are too strong, values that are not finite, and a few tokens. Triton
compiles them when they are first used; importing this module does not import it.
"""

from __future__ import annotations

import torch

from receptance.ops import wkv7_chunked
from receptance.ops.arguments import (
    Wkv7BackwardInputs,
    Wkv7Gradients,
    Wkv7Inputs,
    Wkv7Results,
)
from receptance.ops.triton_launching import Launcher, fits, readable
from receptance.ops.wkv7_chunked import CHUNK, kept_states

__all__ = ["CHUNK", "backward", "forward", "kept_states"]

# The warps of each kernel: with fewer, what does not fit into registers is moved to memory.
WARPS = {
    "solve": 4,
    "states": 4,
    "outputs": 4,
    "solve_backward": 4,
    "states_backward": 4,
    "readers_backward": 8,
    "writers_backward": 8,
}


def forward(x: Wkv7Inputs) -> Wkv7Results:
    """Output [B,T,H,N], the state after the last token [B,H,N,N], chunk starts [K,B,H,N,N]."""
    return wkv7_chunked.forward(x, _forward if fits(x.state) else None)


def backward(x: Wkv7BackwardInputs) -> Wkv7Gradients:
    """Gradients of the six inputs [B,T,H,N] and of the state [B,H,N,N]."""
    return wkv7_chunked.backward(x, _backward if fits(x.grad_state) else None)


def _forward(x: Wkv7Inputs) -> Wkv7Results:
    x = Wkv7Inputs(**readable(x))
    r, w, k, v, a, b, state, resets, _ = x
    through, u, out, after = map(torch.empty_like, (w, w, v, state))
    starts = state.new_empty(kept_states(k.shape[1]), *state.shape)
    run = Launcher("triton_wkv7_kernels", k.shape, CHUNK, WARPS)
    run.chunks("solve", w, k, v, a, b, resets, None, through, u)
    run.states("states", w, k, v, b, resets, through, u, state, starts, after)
    run.chunks("outputs", r, w, k, v, b, resets, u, starts, out)
    return out, after, starts


def _backward(x: Wkv7BackwardInputs) -> Wkv7Gradients:
    x = Wkv7BackwardInputs(**readable(x))
    y, grad_after, r, w, k, v, a, b, starts, resets, _ = x
    through, u, z, ends, before = map(torch.empty_like, (w, w, w, starts, grad_after))
    of_r, of_w, of_k, of_v, of_a, of_b = map(torch.empty_like, (r, w, k, v, a, b))
    run = Launcher("triton_wkv7_kernels", k.shape, CHUNK, WARPS)
    run.chunks("solve", w, k, v, a, b, resets, starts, through, u)
    run.chunks("solve_backward", y, r, w, a, b, resets, through, z)
    run.states("states_backward", y, r, w, a, resets, through, z, grad_after, ends, before)
    inputs = (y, r, w, k, v, a, b, resets, u, z, starts)
    run.chunks("readers_backward", *inputs, of_r, of_w, of_a)
    run.chunks("writers_backward", *inputs, ends, of_w, of_k, of_v, of_b)
    return of_r, of_w, of_k, of_v, of_a, of_b, before
