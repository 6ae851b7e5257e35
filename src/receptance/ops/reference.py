"""The WKV-4 recurrence as a loop over time: the definition that every backend must match."""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.ops.arguments import Inputs

EMPTY_EXPONENT = -1e30
"""Exponent of a state that has seen nothing. Finite, because -inf - (-inf) is NaN."""


def wkv4(x: Inputs) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
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
    key, value, lengths = x.key, x.value, x.lengths
    numerator, denominator, exponent = x.numerator, x.denominator, x.exponent.detach()
    outputs = []
    if lengths is not None:  # A NaN beyond a row's end would reach the gradients.
        beyond = torch.arange(key.shape[1], device=key.device) >= lengths[:, None]
        key, value = (part.masked_fill(beyond[..., None], 0) for part in (key, value))
    keys, values = (part.to(numerator.dtype).unbind(1) for part in (key, value))
    for t, (k, v) in enumerate(zip(keys, values, strict=True)):
        before = (numerator, denominator, exponent)
        if x.resets is not None:
            forget = x.resets[:, t, None]
            numerator = numerator.masked_fill(forget, 0)
            denominator = denominator.masked_fill(forget, 0)
            exponent = exponent.masked_fill(forget, EMPTY_EXPONENT)

        top = torch.maximum(exponent, x.bonus + k).detach()
        past, now = (exponent - top).exp(), (x.bonus + k - top).exp()
        out = (numerator * past + now * v) / (denominator * past + now)

        top = torch.maximum(exponent + x.log_decay, k).detach()
        past, now = (exponent + x.log_decay - top).exp(), (k - top).exp()
        after = [numerator * past + now * v, denominator * past + now, top]

        if lengths is not None:
            real = (t < lengths)[:, None]
            out = torch.where(real, out, 0)
            after = [torch.where(real, *parts) for parts in zip(after, before, strict=True)]
        numerator, denominator, exponent = after
        outputs.append(out)
    out = torch.stack(outputs, dim=1) if outputs else value
    return out.to(value.dtype), (numerator, denominator, exponent)
