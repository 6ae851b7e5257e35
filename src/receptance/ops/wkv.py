"""The public WKV-4 operator: check once, choose a backend, call it.

One custom op, `receptance::wkv4`, stands before every kernel; its gradient is a second one. Both
forms of the model, parallel and recurrent, are this call with different T.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from receptance.ops import chunked, native, reference, triton_wkv4
from receptance.ops.arguments import BackwardInputs, Gradients, Inputs, Results
from receptance.ops.reference import EMPTY_EXPONENT


class Kernel(Protocol):
    """What a kernel module offers; the reference is differentiated by autograd instead."""

    def kept_states(self, time: int, /) -> int:
        """How many states forward keeps for backward."""

    def forward(self, x: Inputs, /) -> Results:
        """The output, the final state's three parts, and the states that were kept."""

    def backward(self, x: BackwardInputs, /) -> Gradients:
        """Gradients of log_decay, bonus, key, value, numerator, denominator."""


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
    _check(Inputs(log_decay, bonus, key, value, *state, resets, lengths))
    name = choose_backend(key.device, backend)
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
    if x.resets is not None and x.resets.dtype != torch.bool:
        raise ValueError(f"resets is {x.resets.dtype}; it must be torch.bool")
    if x.lengths is not None and (x.lengths.is_floating_point() or x.lengths.dtype == torch.bool):
        raise ValueError(f"lengths is {x.lengths.dtype}; it must hold integers")


# A custom op takes tensors one by one: the fields of Inputs or of BackwardInputs, in order, and
# then the name of the backend. Only the functions below know that.


def _wkv4(*flat: Any) -> Results:
    return KERNELS[flat[-1]].forward(Inputs(*flat[:-1]))


def _fake(*flat: Any) -> Results:
    x, backend = Inputs(*flat[:-1]), flat[-1]
    batch, time, width = x.key.shape
    out, numerator, denominator, exponent = map(
        _like, (x.value, x.numerator, x.denominator, x.exponent)
    )
    kept = KERNELS[backend].kept_states(time)
    return out, numerator, denominator, exponent, x.numerator.new_empty(batch, kept, 3, width)


def _wkv4_backward(*flat: Any) -> Gradients:
    return KERNELS[flat[-1]].backward(BackwardInputs(*flat[:-1]))


def _fake_backward(*flat: Any) -> tuple[Tensor, ...]:
    x = BackwardInputs(*flat[:-1])
    like = (x.log_decay, x.bonus, x.key, x.value, x.grad_numerator, x.grad_denominator)
    return tuple(map(_like, like))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    x, ctx.backend = Inputs(*inputs[:-1]), inputs[-1]
    saved = (x.log_decay, x.bonus, x.key, x.value, output[-1], x.resets, x.lengths)
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, grad_out: Tensor, grad_a: Tensor, grad_b: Tensor, *_: Tensor) -> Any:
    x = BackwardInputs(grad_out, grad_a, grad_b, *ctx.saved_tensors)
    grads = torch.ops.receptance.wkv4_backward.default(*x, ctx.backend)
    # None for the exponent: every consumer sees numerator e^exponent, so it carries no gradient.
    return *grads, None, None, None, None


def _backward_of_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("wkv4 has no autograd formula for its second derivative")


def _schema(arguments: type[Inputs] | type[BackwardInputs], results: int) -> str:
    """The signature of an op: a tensor for every field, then the backend -> so many tensors."""
    optional = arguments._field_defaults
    tensors = [f"Tensor{'?' * (name in optional)} {name}" for name in arguments._fields]
    return f"({', '.join(tensors)}, str backend) -> ({', '.join(['Tensor'] * results)})"


# This does what torch.library.custom_op does, without its wrapper, which costs as much time as a
# small step.
for _name, _function, _shapes, _signature in (
    ("receptance::wkv4", _wkv4, _fake, _schema(Inputs, 5)),
    ("receptance::wkv4_backward", _wkv4_backward, _fake_backward, _schema(BackwardInputs, 6)),
):
    torch.library.define(_name, _signature)
    torch.library.impl(_name, "CompositeExplicitAutograd", _function)
    torch.library.register_fake(_name, _shapes)
torch.library.register_autograd("receptance::wkv4", _backward, setup_context=_setup_context)
torch.library.register_autograd("receptance::wkv4_backward", _backward_of_backward)
