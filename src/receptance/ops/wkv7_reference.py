"""The WKV-7 recurrence as a loop over time: the definition that every backend must match."""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.ops.arguments import Wkv7Inputs


def wkv7(x: Wkv7Inputs) -> tuple[Tensor, Tensor]:
    """One token after another (RWKV-7 in arXiv 2503.14456, the generalized delta rule).

        S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

    with w = e^log_decay, a the removal, b the replacement; all inputs are [B,T,H,N]. The state is
    [B,H,N,N] in float32 or wider; its rows belong to values and its columns to keys. A row of the
    batch whose resets [B,T] is true at t forgets what came before t; its state is the one after its
    lengths [B] tokens, and its outputs beyond them are zero.

    Returns y [B,T,H,N] in value's dtype and the state. Differentiable by autograd.
    """
    state, lengths, narrow = x.state, x.lengths, x.value.dtype
    inputs = [x.receptance, x.log_decay, x.key, x.value, x.removal, x.replacement]
    if lengths is not None:  # A NaN beyond a row's end would reach the gradients.
        beyond = torch.arange(x.key.shape[1], device=x.key.device) >= lengths[:, None]
        inputs = [part.masked_fill(beyond[..., None, None], 0) for part in inputs]
    outputs = []
    steps = zip(*(part.to(state.dtype).unbind(1) for part in inputs), strict=True)
    for t, (r, log_w, k, v, a, b) in enumerate(steps):
        before = state
        if x.resets is not None:
            state = state.masked_fill(x.resets[:, t, None, None, None], 0)
        removed = (state * a[..., None, :]).sum(-1)
        state = state * log_w.exp()[..., None, :]
        state = state + removed[..., None] * b[..., None, :] + v[..., None] * k[..., None, :]
        out = (state * r[..., None, :]).sum(-1)
        if lengths is not None:
            real = (t < lengths)[:, None, None]
            out = torch.where(real, out, 0)
            state = torch.where(real[..., None], state, before)
        outputs.append(out)
    out = torch.stack(outputs, dim=1) if outputs else x.value
    return out.to(narrow), state
