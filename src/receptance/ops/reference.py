"""The WKV-4 recurrence as a loop over time: the definition that every backend must match."""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY_EXPONENT = -1e30
"""Exponent of a state that has seen nothing. Finite, because -inf - (-inf) is NaN."""


def wkv4(
    log_decay: Tensor,
    bonus: Tensor,
    key: Tensor,
    value: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One token after another, in the stable form of equations 23 to 28 of arXiv 2305.13048.

        y_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t})
        a_t = e^w a_{t-1} + e^{k_t} v_t        b_t = e^w b_{t-1} + e^{k_t}

    with w the (negative) log_decay [C], u the bonus [C], key and value [B,T,C]. The state holds
    a = numerator e^exponent and b = denominator e^exponent, each part [B,C] in float32 or wider.
    A row whose resets [B,T] is true at t forgets what came before t; a row's state is the one
    after its lengths [B] tokens, and its outputs beyond them are zero.

    Returns y [B,T,C] in value's dtype and the state. Differentiable by autograd; exponents are
    constants to it, which is exact because they cancel wherever a state is used.
    """
    numerator, denominator, exponent = state
    exponent = exponent.detach()
    outputs = []
    if lengths is not None:  # A NaN beyond a row's end would reach the gradients.
        beyond = torch.arange(key.shape[1], device=key.device) >= lengths[:, None]
        key, value = (x.masked_fill(beyond[..., None], 0) for x in (key, value))
    keys, values = (x.to(numerator.dtype).unbind(1) for x in (key, value))
    for t, (k, v) in enumerate(zip(keys, values, strict=True)):
        before = (numerator, denominator, exponent)
        if resets is not None:
            forget = resets[:, t, None]
            numerator = numerator.masked_fill(forget, 0)
            denominator = denominator.masked_fill(forget, 0)
            exponent = exponent.masked_fill(forget, EMPTY_EXPONENT)

        top = torch.maximum(exponent, bonus + k).detach()
        past, now = (exponent - top).exp(), (bonus + k - top).exp()
        out = (numerator * past + now * v) / (denominator * past + now)

        top = torch.maximum(exponent + log_decay, k).detach()
        past, now = (exponent + log_decay - top).exp(), (k - top).exp()
        after = [numerator * past + now * v, denominator * past + now, top]

        if lengths is not None:
            real = (t < lengths)[:, None]
            out = torch.where(real, out, 0)
            after = [torch.where(real, x, y) for x, y in zip(after, before, strict=True)]
        numerator, denominator, exponent = after
        outputs.append(out)
    out = torch.stack(outputs, dim=1) if outputs else value
    return out.to(value.dtype), (numerator, denominator, exponent)
