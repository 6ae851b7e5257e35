"""The public WKV-4 operator: check once, choose a backend, call it.

One custom op, `receptance::wkv4`, stands before every kernel; its gradient is a second one. Both
forms of the model, parallel and recurrent, are this call with different T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from receptance.ops import reference
from receptance.ops.arguments import BackwardInputs, Inputs, check_masks
from receptance.ops.backends import choose_backend
from receptance.ops.reference import EMPTY_EXPONENT
from receptance.ops.registration import Operator, register


class WKVState(NamedTuple):
    """The state of the operator: a = numerator e^exponent, b = denominator e^exponent.

    Each part is [B,C], float32 (float64 when the inputs are).
    """

    numerator: Tensor
    denominator: Tensor
    exponent: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> WKVState:
        """The state of rows that have seen nothing: three times [B,C]."""
        zeros = torch.zeros(batch, width, device=device, dtype=dtype)
        return cls(zeros, zeros.clone(), torch.full_like(zeros, EMPTY_EXPONENT))


def wkv4(
    log_decay: Tensor,
    bonus: Tensor,
    key: Tensor,
    value: Tensor,
    state: WKVState | None = None,
    *,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, WKVState]:
    """The weighted key-value average of RWKV-4 (equation 16 of arXiv 2305.13048).

    log_decay [C] is -exp(time_decay), so never positive; bonus [C]; key and value [B,T,C] of one
    dtype; state as returned by an earlier call, or None for rows that have seen nothing.
    resets [B,T] bool: true where a row forgets everything before that position.
    lengths [B] integers in 0..T: the state returned is the one after that many tokens of the row,
    what follows changes nothing, and the outputs there are zero.

    Returns out [B,T,C] in value's dtype and the new state; nothing is mutated, and gradients flow
    through every floating-point argument, the state included. ValueError on shapes, dtypes or
    devices that do not fit, and on a named backend that is not available.
    """
    _check_pair(key, value)
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    if state is None:
        state = WKVState.empty(key.shape[0], key.shape[-1], device=key.device, dtype=dtype)
    state = WKVState(*state)
    _check(Inputs(log_decay, bonus, key, value, *state, resets, lengths))
    name = choose_backend("wkv4", key.device, backend)
    # A decay of e^-1e30 is 0 like e^-inf, but 0 tokens of it are a factor of 1 and not NaN.
    log_decay, bonus = log_decay.to(dtype).clamp(min=-1e30), bonus.to(dtype)
    x = Inputs(log_decay, bonus, key, value, *state, resets, lengths)
    if name == "reference":
        out, parts = reference.wkv4(x)
        return out, WKVState(*parts)
    out, numerator, denominator, exponent, _ = torch.ops.receptance.wkv4.default(*x, name)
    return out, WKVState(numerator, denominator, exponent.detach())


def _check_pair(key: Tensor, value: Tensor) -> None:
    if key.dim() != 3 or key.shape != value.shape:
        raise ValueError(
            f"key is {list(key.shape)} and value {list(value.shape)}; both must be [B,T,C]"
        )
    if key.dtype != value.dtype or not key.is_floating_point():
        raise ValueError(f"key is {key.dtype} and value {value.dtype}; they must be one float type")


def _check(x: Inputs) -> None:
    batch, time, width = x.key.shape
    wanted = torch.float64 if x.key.dtype == torch.float64 else torch.float32
    for name, tensor, shape in (
        ("log_decay", x.log_decay, (width,)),
        ("bonus", x.bonus, (width,)),
        ("value", x.value, (batch, time, width)),
        ("resets", x.resets, (batch, time)),
        ("lengths", x.lengths, (batch,)),
        *((f"state.{part}", getattr(x, part), (batch, width)) for part in WKVState._fields),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; with this key it must be {[*shape]}")
        if tensor.device != x.key.device:
            raise ValueError(f"{name} is on {tensor.device} and key on {x.key.device}; move one")
        if name.startswith("state.") and tensor.dtype != wanted:
            raise ValueError(
                f"{name} is {tensor.dtype}; with {x.key.dtype} keys it must be {wanted}"
            )
    for name, tensor in (("log_decay", x.log_decay), ("bonus", x.bonus)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be a float type")
    check_masks(x.resets, x.lengths)


register(
    Operator(
        name="wkv4",
        inputs=Inputs,
        backward_inputs=BackwardInputs,
        results=("value", "numerator", "denominator", "exponent"),
        # The exponent has none: every consumer sees numerator e^exponent, so it cancels.
        gradients=(*Inputs._fields[:4], "grad_numerator", "grad_denominator"),
        kept_shape=lambda x, count: (x.numerator.shape[0], count, 3, x.numerator.shape[1]),
    )
)
