"""The public WKV-6 operator: check once, choose a backend, call it.

One custom op, `receptance::wkv6`, stands before every kernel; its gradient is a second one. Both
forms of the model, parallel and recurrent, are this call with different T. RWKV-5 is the case of
decays that do not depend on the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.ops import wkv6_reference
from receptance.ops.arguments import Wkv6BackwardInputs, Wkv6Inputs, check_masks
from receptance.ops.backends import choose_backend
from receptance.ops.registration import Operator, register


def wkv6(
    receptance: Tensor,
    log_decay: Tensor,
    key: Tensor,
    value: Tensor,
    bonus: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The memory of RWKV-5 and RWKV-6 (arXiv 2404.05892), for H heads of N channels.

        y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(w_t) S_{t-1} + k_t v_t^T

    receptance, key and value are [B,T,H,N], of one float dtype. log_decay is log w, never positive:
    [B,T,H,N], or [H,N] where it is the same for all tokens. bonus is u [H,N], by which a token
    itself counts in its output. Both may be wider than the others, and are best left in float32.
    state is [B,H,N,N], as an earlier call returned it, or None for rows that have seen nothing: its
    rows belong to keys and its columns to values, as in the official code of these versions (but
    not of RWKV-7). It is float32, or float64 with float64 inputs.
    resets [B,T] bool: true where a row forgets everything before that position.
    lengths [B] integers in 0..T: the state returned is the one after that many tokens of the row,
    what follows changes nothing, and the outputs there are zero.

    Returns out [B,T,H,N] in value's dtype and the new state; nothing is mutated, and gradients flow
    through every floating-point argument, the state included. ValueError on shapes, dtypes or
    devices that do not fit, and on a named backend that is not available.
    """
    _check_keys(key)
    dtype, shape = _wide(key), key.shape
    if state is None:
        batch, _, heads, size = shape
        state = torch.zeros(batch, heads, size, size, device=key.device, dtype=dtype)
    if log_decay.shape == shape[2:]:
        log_decay = log_decay.expand(shape)
    x = Wkv6Inputs(receptance, log_decay, key, value, bonus, state, resets, lengths)
    _check(x)
    name = choose_backend("wkv6", key.device, backend)
    x = x._replace(log_decay=log_decay.to(dtype), bonus=bonus.to(dtype))
    if name == "reference":
        return wkv6_reference.wkv6(x)
    out, state, _ = torch.ops.receptance.wkv6.default(*x, name)
    return out, state


def _wide(key: Tensor) -> torch.dtype:
    return torch.float64 if key.dtype == torch.float64 else torch.float32


def _check_keys(key: Tensor) -> None:
    if key.dim() != 4 or not key.is_floating_point():
        raise ValueError(f"key is {key.dtype} {list(key.shape)}; it must be floats [B,T,H,N]")


def _check(x: Wkv6Inputs) -> None:
    batch, time, heads, size = x.key.shape
    for name, tensor in x._asdict().items():
        shape: tuple[int, ...] = {
            "bonus": (heads, size),
            "state": (batch, heads, size, size),
            "resets": (batch, time),
            "lengths": (batch,),
        }.get(name, (batch, time, heads, size))
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; with this key it must be {[*shape]}")
        if tensor.device != x.key.device:
            raise ValueError(f"{name} is on {tensor.device} and key on {x.key.device}; move one")
    for name in ("receptance", "value"):
        if (found := getattr(x, name).dtype) != x.key.dtype:
            raise ValueError(
                f"{name} is {found} and key {x.key.dtype}; they must be one float type"
            )
    for name in ("log_decay", "bonus"):
        if not (found := getattr(x, name)).is_floating_point():
            raise ValueError(f"{name} is {found.dtype}; it must be a float type")
    if x.state.dtype != _wide(x.key):
        raise ValueError(
            f"state is {x.state.dtype}; with {x.key.dtype} keys it must be {_wide(x.key)}"
        )
    check_masks(x.resets, x.lengths)


def _kept_shape(x: Wkv6Inputs, count: int) -> tuple[int, ...]:
    return (count, *x.state.shape)


register(
    Operator(
        name="wkv6",
        inputs=Wkv6Inputs,
        backward_inputs=Wkv6BackwardInputs,
        results=("value", "state"),
        gradients=(*Wkv6Inputs._fields[:5], "grad_state"),
        kept_shape=_kept_shape,
    )
)
