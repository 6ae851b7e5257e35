"""The public WKV-4 operator: check once, choose a backend, call it.

One custom op, `receptance::wkv4`, stands before every kernel; its gradient is a second one. Both
forms of the model, parallel and recurrent, are this call with different T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from receptance.ops import chunked, native, reference, triton_wkv4
from receptance.ops.reference import EMPTY_EXPONENT

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """What a kernel module offers; the reference is differentiated by autograd instead."""

    kept_states: Callable[..., int]  # of T: how many states forward keeps for backward
    forward: Callable[..., Saved]  # arguments and results as those of _wkv4 and _wkv4_backward
    backward: Callable[..., Gradients]


KERNELS: dict[str, Kernel] = {"native": native, "triton": triton_wkv4, "chunked": chunked}


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


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names that `wkv4(backend=...)` accepts on this device, the fastest first."""
    return [*_compiled(torch.device(device)), "chunked", "reference"]


def choose_backend(device: torch.device, requested: str | None) -> str:
    """The fastest backend, or the requested one; ValueError if that one cannot run here."""
    available = available_backends(device)
    if requested is None:
        return available[0]
    if requested not in available:
        raise ValueError(
            f"no wkv4 backend {requested!r} on {device.type}; available: {', '.join(available)}"
        )
    return requested


def _compiled(device: torch.device) -> list[str]:
    """The compiled backend for this kind of device, or none if it is absent."""
    if device.type == "cpu":
        return ["native"] * native.is_available()
    return ["triton"] * (device.type == "cuda" and triton_wkv4.is_available())


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
    _check(log_decay, bonus, key, value, state, resets, lengths)
    name = choose_backend(key.device, backend)
    # A decay of e^-1e30 is 0 like e^-inf, but 0 tokens of it are a factor of 1 and not NaN.
    log_decay, bonus = log_decay.to(dtype).clamp(min=-1e30), bonus.to(dtype)
    if name == "reference":
        out, parts = reference.wkv4(log_decay, bonus, key, value, state, resets, lengths)
        return out, WKVState(*parts)
    out, numerator, denominator, exponent, _ = torch.ops.receptance.wkv4.default(
        log_decay, bonus, key, value, *state, resets, lengths, name
    )
    return out, WKVState(numerator, denominator, exponent.detach())


def _check_pair(key: Tensor, value: Tensor) -> None:
    if key.dim() != 3 or key.shape != value.shape:
        raise ValueError(
            f"key is {list(key.shape)} and value {list(value.shape)}; both must be [B,T,C]"
        )
    if key.dtype != value.dtype or not key.is_floating_point():
        raise ValueError(f"key is {key.dtype} and value {value.dtype}; they must be one float type")


def _check(
    log_decay: Tensor,
    bonus: Tensor,
    key: Tensor,
    value: Tensor,
    state: WKVState,
    resets: Tensor | None,
    lengths: Tensor | None,
) -> None:
    batch, time, width = key.shape
    wanted = torch.float64 if key.dtype == torch.float64 else torch.float32
    for name, tensor, shape in (
        ("log_decay", log_decay, (width,)),
        ("bonus", bonus, (width,)),
        ("value", value, (batch, time, width)),
        ("resets", resets, (batch, time)),
        ("lengths", lengths, (batch,)),
        *((f"state.{n}", x, (batch, width)) for n, x in zip(state._fields, state, strict=True)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; with this key it must be {[*shape]}")
        if tensor.device != key.device:
            raise ValueError(f"{name} is on {tensor.device} and key on {key.device}; move one")
        if name.startswith("state.") and tensor.dtype != wanted:
            raise ValueError(f"{name} is {tensor.dtype}; with {key.dtype} keys it must be {wanted}")
    for name, tensor in (("log_decay", log_decay), ("bonus", bonus)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be a float type")
    if resets is not None and resets.dtype != torch.bool:
        raise ValueError(f"resets is {resets.dtype}; it must be torch.bool")
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise ValueError(f"lengths is {lengths.dtype}; it must hold integers")


def _wkv4(
    log_decay: Tensor,
    bonus: Tensor,
    key: Tensor,
    value: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    exponent: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    backend: str,
) -> Saved:
    """out, numerator, denominator, exponent, and the states that the backward starts from."""
    return KERNELS[backend].forward(
        log_decay, bonus, key, value, numerator, denominator, exponent, resets, lengths
    )


def _fake(log_decay, bonus, key, value, numerator, denominator, exponent, resets, lengths, backend):  # type: ignore[no-untyped-def]
    batch, time, width = key.shape
    kept = KERNELS[backend].kept_states(time)
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format),
        torch.empty_like(numerator, memory_format=torch.contiguous_format),
        torch.empty_like(denominator, memory_format=torch.contiguous_format),
        torch.empty_like(exponent, memory_format=torch.contiguous_format),
        numerator.new_empty(batch, kept, 3, width),
    )


def _wkv4_backward(
    grad_out: Tensor,
    grad_numerator: Tensor,
    grad_denominator: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    backend: str,
) -> Gradients:
    """Gradients of log_decay, bonus, key, value, numerator, denominator."""
    return KERNELS[backend].backward(
        grad_out,
        grad_numerator,
        grad_denominator,
        log_decay,
        bonus,
        key,
        value,
        starts,
        resets,
        lengths,
    )


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_out,
    grad_numerator,
    grad_denominator,
    log_decay,
    bonus,
    key,
    value,
    starts,
    resets,
    lengths,
    backend,
):
    like = (log_decay, bonus, key, value, grad_numerator, grad_denominator)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    log_decay, bonus, key, value, _, _, _, resets, lengths, backend = inputs
    ctx.save_for_backward(log_decay, bonus, key, value, output[-1], resets, lengths)
    ctx.backend = backend


def _backward(ctx, grad_out, grad_numerator, grad_denominator, *_):  # type: ignore[no-untyped-def]
    grads = torch.ops.receptance.wkv4_backward.default(
        grad_out, grad_numerator, grad_denominator, *ctx.saved_tensors, ctx.backend
    )
    # None for the exponent: every consumer sees numerator e^exponent, so it carries no gradient.
    return *grads, None, None, None, None


def _backward_of_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError("wkv4 has no autograd formula for its second derivative")


# This does what torch.library.custom_op does, without its wrapper, which costs as much time as a
# small step.
for _name, _function, _shapes in (
    ("receptance::wkv4", _wkv4, _fake),
    ("receptance::wkv4_backward", _wkv4_backward, _fake_backward),
):
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(_name, "CompositeExplicitAutograd", _function)
    torch.library.register_fake(_name, _shapes)
torch.library.register_autograd("receptance::wkv4", _backward, setup_context=_setup_context)
torch.library.register_autograd("receptance::wkv4_backward", _backward_of_backward)
