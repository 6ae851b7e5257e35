"""WKV-6 on GPUs: how its Triton kernels are launched.

They do what the matrix form of wkv6_chunked does, which stays in charge of everything else: rows
that have ended, values that are not finite, and a few tokens. Triton compiles them when they are
first used; importing this module does not import it.
"""

from __future__ import annotations

import torch

from receptance.ops import wkv6_chunked
from receptance.ops.arguments import (
    Wkv6BackwardInputs,
    Wkv6Gradients,
    Wkv6Inputs,
    Wkv6Results,
)
from receptance.ops.triton_launching import Launcher, fits, readable
from receptance.ops.wkv6_chunked import CHUNK, kept_states

__all__ = ["CHUNK", "backward", "forward", "kept_states"]

# The warps of each kernel: with fewer, what does not fit into registers is moved to memory.
WARPS = {
    "states": 4,
    "outputs": 4,
    "states_backward": 4,
    "borders_backward": 8,
    "pairs_backward": 8,
}


def forward(x: Wkv6Inputs) -> Wkv6Results:
    """Output [B,T,H,N], the state after the last token [B,H,N,N], chunk starts [K,B,H,N,N]."""
    return wkv6_chunked.forward(x, _forward if fits(x.state) else None)


def backward(x: Wkv6BackwardInputs) -> Wkv6Gradients:
    """Gradients of the four inputs [B,T,H,N], of the bonus [H,N] and of the state [B,H,N,N]."""
    return wkv6_chunked.backward(x, _backward if fits(x.grad_state) else None)


def _forward(x: Wkv6Inputs) -> Wkv6Results:
    r, w, k, v, u, state, resets, _ = Wkv6Inputs(**readable(x))
    out, after = map(torch.empty_like, (v, state))
    starts = state.new_empty(kept_states(k.shape[1]), *state.shape)
    run = Launcher("triton_wkv6_kernels", k.shape, CHUNK, WARPS)
    run.states("states", w, k, v, resets, state, starts, after)
    run.chunks("outputs", r, w, k, v, u, resets, starts, out)
    return out, after, starts


def _backward(x: Wkv6BackwardInputs) -> Wkv6Gradients:
    y, grad_after, r, w, k, v, u, starts, resets, _ = Wkv6BackwardInputs(**readable(x))
    ends, before = map(torch.empty_like, (starts, grad_after))
    of_r, of_w, of_k, of_v = map(torch.empty_like, (r, w, k, v))
    at_borders = [torch.empty_like(w) for _ in range(3)]
    bonus = w.new_empty(*starts.shape[:-1])
    run = Launcher("triton_wkv6_kernels", k.shape, CHUNK, WARPS)
    run.states("states_backward", y, r, w, resets, grad_after, ends, before)
    of_borders = at_borders[0], of_w, *at_borders[1:]
    run.chunks("borders_backward", y, r, w, k, v, resets, starts, ends, *of_borders)
    grads = of_r, of_w, of_k, of_v, bonus
    run.chunks("pairs_backward", y, r, w, k, v, u, resets, *at_borders, *grads)
    return of_r, of_w, of_k, of_v, bonus.sum((0, 1)), before
