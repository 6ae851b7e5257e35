"""The WKV-6 recurrence as a loop over time: the definition that every backend must match."""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.ops.arguments import Wkv6Inputs


def wkv6(x: Wkv6Inputs) -> tuple[Tensor, Tensor]:
    """One token after another (RWKV-6 in arXiv 2404.05892, equations 17 and 18).

        y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(w_t) S_{t-1} + k_t v_t^T

    with w = e^log_decay and u the bonus [H,N]; the other inputs are [B,T,H,N]. The state is
    [B,H,N,N] in float32 or wider; its rows belong to keys and its columns to values. A row of the
    batch whose resets [B,T] is true at t forgets what came before t; its state is the one after its
    lengths [B] tokens, and its outputs beyond them are zero.

    Returns y [B,T,H,N] in value's dtype and the state. Differentiable by autograd.
    """
    state, lengths, narrow = x.state, x.lengths, x.value.dtype
    inputs = [x.receptance, x.log_decay, x.key, x.value]
    if lengths is not None:  # A NaN beyond a row's end would reach the gradients.
        beyond = torch.arange(x.key.shape[1], device=x.key.device) >= lengths[:, None]
        inputs = [part.masked_fill(beyond[..., None, None], 0) for part in inputs]
    outputs = []
    steps = zip(*(part.to(state.dtype).unbind(1) for part in inputs), strict=True)
    for t, (r, log_w, k, v) in enumerate(steps):
        before = state
        if x.resets is not None:
            state = state.masked_fill(x.resets[:, t, None, None, None], 0)
        added = k[..., :, None] * v[..., None, :]
        out = ((state + x.bonus[..., None] * added) * r[..., None]).sum(-2)
        state = state * log_w.exp()[..., None] + added
        if lengths is not None:
            real = (t < lengths)[:, None, None]
            out = torch.where(real, out, 0)
            state = torch.where(real[..., None], state, before)
        outputs.append(out)
    out = torch.stack(outputs, dim=1) if outputs else x.value
    return out.to(narrow), state
