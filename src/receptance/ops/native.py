"""WKV-4 in C++ for CPUs (sources in receptance/native): float32, bfloat16 and float64.

Built when the package is installed; without a compiler the module is absent and
`is_available()` says so.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from receptance.ops.arguments import BackwardInputs, Gradients, Inputs, Results
from receptance.ops.threads import usable_threads

CHUNK = 32  # It equals kChunk in wkv4.h.

# The numbers of the enum Element in element.h. Other types are converted to float32 and back.
_ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

# A call with fewer elements than this finishes before other threads have woken up.
_SERIAL_ELEMENTS = 8192


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("receptance._native")
    except ImportError:
        return None


# The module is loaded here, which is cheap, because torch.compile cannot trace an import on first
# use.
_LIBRARY = _load()


def library() -> ModuleType | None:
    """The compiled module, or None where it was not built."""
    return _LIBRARY


def is_available() -> bool:
    """Whether the kernels were built for this Python."""
    return library() is not None


def instruction_sets() -> list[str]:
    """What the kernels can use on this machine, the fastest first; empty without kernels."""
    module = library()
    return [] if module is None else list(module.instruction_sets())


def kept_states(time: int) -> int:
    """How many states forward keeps: one before every chunk."""
    return -(-time // CHUNK)


def forward(x: Inputs, instruction_set: str = "") -> Results:
    """Output [B,T,C], the final state's three parts [B,C], chunk starts [B,N,3,C]."""
    batch, time, width = x.key.shape
    dtype, inner, wide = x.value.dtype, inner_dtype(x.value.dtype), x.exponent.dtype
    out = torch.empty(batch, time, width, dtype=inner)
    a = torch.empty(batch, width, dtype=wide)
    b, o = torch.empty_like(a), torch.empty_like(a)
    starts = torch.empty(batch, kept_states(time), 3, width, dtype=wide)
    inputs = [
        x.log_decay.contiguous(),
        x.bonus.contiguous(),
        x.key.to(inner).contiguous(),
        x.value.to(inner).contiguous(),
        x.numerator.contiguous(),
        x.denominator.contiguous(),
        x.exponent.contiguous(),
        *masks(x.resets, x.lengths, time),
    ]
    _call("wkv4_forward", x.key.shape, inner, instruction_set, [*inputs, out, a, b, o, starts])
    return out.to(dtype), a, b, o, starts


def backward(x: BackwardInputs, instruction_set: str = "") -> Gradients:
    """Gradients of log_decay, bonus, key, value, numerator, denominator (shapes as those)."""
    batch, time, width = x.key.shape
    dtype, inner, wide = x.key.dtype, inner_dtype(x.key.dtype), x.starts.dtype
    grad_vectors = [torch.empty(batch, width, dtype=torch.float64) for _ in range(2)]
    grad_key, grad_value = (torch.empty(batch, time, width, dtype=inner) for _ in range(2))
    grad_a, grad_b = (torch.empty(batch, width, dtype=wide) for _ in range(2))
    inputs = [
        x.grad_out.to(inner).contiguous(),
        x.grad_numerator.contiguous(),
        x.grad_denominator.contiguous(),
        x.log_decay.contiguous(),
        x.bonus.contiguous(),
        x.key.to(inner).contiguous(),
        x.value.to(inner).contiguous(),
        x.starts.contiguous(),
        *masks(x.resets, x.lengths, time),
    ]
    outputs = [*grad_vectors, grad_key, grad_value, grad_a, grad_b]
    _call("wkv4_backward", x.key.shape, inner, instruction_set, [*inputs, *outputs])
    grad_decay, grad_bonus = (vector.sum(0).to(wide) for vector in grad_vectors)
    return grad_decay, grad_bonus, grad_key.to(dtype), grad_value.to(dtype), grad_a, grad_b


def _call(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    instruction_set: str,
    tensors: list[Tensor | None],
) -> None:
    threads = 1 if shape.numel() < _SERIAL_ELEMENTS else usable_threads()
    call(name, shape, dtype, tensors, threads=threads, instruction_set=instruction_set)


# ---- what the modules of all operators share ----------------------------------------------------


def inner_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of elements with which the kernels compute where tensors have this one."""
    return dtype if dtype in _ELEMENTS else torch.float32


def masks(
    resets: Tensor | None, lengths: Tensor | None, time: int
) -> tuple[Tensor | None, Tensor | None]:
    """resets [B,T] and lengths [B] as the kernels read them."""
    # Lengths index memory in the kernels: keep them inside it whatever the caller passed.
    lengths = None if lengths is None else lengths.long().clamp(0, time).contiguous()
    return None if resets is None else resets.contiguous(), lengths


def call(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    tensors: list[Tensor | None],
    *,
    threads: int,
    instruction_set: str,
) -> None:
    """Call a function of the library for contiguous tensors, those of elements in `dtype`."""
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    getattr(library(), name)(*shape, _ELEMENTS[dtype], threads, instruction_set, addresses)
