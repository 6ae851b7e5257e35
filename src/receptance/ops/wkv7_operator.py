"""The public WKV-7 operator: check once, choose a backend, call it.

One custom op, `receptance::wkv7`, stands before every kernel; its gradient is a second one. Both
forms of the model, parallel and recurrent, are this call with different T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.ops import wkv7_reference
from receptance.ops.arguments import Wkv7BackwardInputs, Wkv7Inputs, check_masks
from receptance.ops.backends import choose_backend
from receptance.ops.registration import Operator, register


def wkv7(
    receptance: Tensor,
    log_decay: Tensor,
    key: Tensor,
    value: Tensor,
    removal: Tensor,
    replacement: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The generalized delta rule of RWKV-7 (arXiv 2503.14456), for H heads of N channels.

        S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

    The first six arguments are [B,T,H,N]. log_decay is log w, never positive; the model's lies
    between -0.6066 and 0. removal is a, the direction that is read from the state and taken away
    (the model passes minus the normalized key), and replacement is b, the direction in which what
    was read is put back (the model passes the normalized key times the in-context learning rate).
    All but log_decay have one float dtype; log_decay may be wider, and is best left in float32.
    state is [B,H,N,N], as an earlier call returned it, or None for rows that have seen nothing: its
    rows belong to values and its columns to keys, as in the official code. It is float32, or
    float64 with float64 inputs.
    resets [B,T] bool: true where a row forgets everything before that position.
    lengths [B] integers in 0..T: the state returned is the one after that many tokens of the row,
    what follows changes nothing, and the outputs there are zero.

    Returns out [B,T,H,N] in value's dtype and the new state; nothing is mutated, and gradients flow
    through every floating-point argument, the state included. ValueError on shapes, dtypes or
    devices that do not fit, and on a named backend that is not available.
    """
    _check_keys(key)
    dtype = _wide(key)
    if state is None:
        batch, _, heads, size = key.shape
        state = torch.zeros(batch, heads, size, size, device=key.device, dtype=dtype)
    x = Wkv7Inputs(receptance, log_decay, key, value, removal, replacement, state, resets, lengths)
    _check(x)
    name = choose_backend("wkv7", key.device, backend)
    x = x._replace(log_decay=log_decay.to(dtype))
    if name == "reference":
        return wkv7_reference.wkv7(x)
    out, state, _ = torch.ops.receptance.wkv7.default(*x, name)
    return out, state


def _wide(key: Tensor) -> torch.dtype:
    return torch.float64 if key.dtype == torch.float64 else torch.float32


def _check_keys(key: Tensor) -> None:
    if key.dim() != 4 or not key.is_floating_point():
        raise ValueError(f"key is {key.dtype} {list(key.shape)}; it must be floats [B,T,H,N]")


def _check(x: Wkv7Inputs) -> None:
    batch, time, heads, size = x.key.shape
    for name, tensor in x._asdict().items():
        shape: tuple[int, ...] = {
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
    for name in ("receptance", "value", "removal", "replacement"):
        if (found := getattr(x, name).dtype) != x.key.dtype:
            raise ValueError(
                f"{name} is {found} and key {x.key.dtype}; they must be one float type"
            )
    if not x.log_decay.is_floating_point():
        raise ValueError(f"log_decay is {x.log_decay.dtype}; it must be a float type")
    if x.state.dtype != _wide(x.key):
        raise ValueError(
            f"state is {x.state.dtype}; with {x.key.dtype} keys it must be {_wide(x.key)}"
        )
    check_masks(x.resets, x.lengths)


def _kept_shape(x: Wkv7Inputs, count: int) -> tuple[int, ...]:
    return (count, *x.state.shape)


register(
    Operator(
        name="wkv7",
        inputs=Wkv7Inputs,
        backward_inputs=Wkv7BackwardInputs,
        results=("value", "state"),
        gradients=(*Wkv7Inputs._fields[:6], "grad_state"),
        kept_shape=_kept_shape,
    )
)
