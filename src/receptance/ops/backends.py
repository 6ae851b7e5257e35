"""The table of backends of every operator, and the choice of one of them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from receptance.ops import (
    chunked,
    native,
    triton_launching,
    triton_wkv4,
    triton_wkv6,
    triton_wkv7,
    wkv6_chunked,
    wkv6_native,
    wkv7_chunked,
    wkv7_native,
)


class Kernel(Protocol):
    """What a kernel module offers; the reference is differentiated by autograd instead.

    The arguments are the tuples of the operator, such as Inputs and BackwardInputs for wkv4 (see
    ops.arguments).
    """

    def kept_states(self, time: int, /) -> int:
        """How many states forward keeps for backward."""

    def forward(self, x: Any, /) -> tuple[Tensor, ...]:
        """The output, the final state's parts, and last the states that were kept."""

    def backward(self, x: Any, /) -> tuple[Tensor, ...]:
        """The gradients of the operator's differentiable inputs, in their order."""


KERNELS: dict[str, dict[str, Kernel]] = {
    "wkv4": {"native": native, "triton": triton_wkv4, "chunked": chunked},
    "wkv6": {"native": wkv6_native, "triton": triton_wkv6, "chunked": wkv6_chunked},
    "wkv7": {"native": wkv7_native, "triton": triton_wkv7, "chunked": wkv7_chunked},
}
"""The kernels of every operator, by name. The reference belongs to each and is not listed."""
OPERATORS = tuple(KERNELS)
"""The names of all operators."""


def available_backends(device: torch.device | str = "cpu", operator: str = "wkv4") -> list[str]:
    """Names that the operator's argument `backend` accepts on this device, the fastest first."""
    device = torch.device(device)
    return [*(n for n in KERNELS[operator] if _runs(n, device)), "reference"]


def choose_backend(operator: str, device: torch.device, requested: str | None) -> str:
    """The fastest backend, or the requested one; ValueError if that one cannot run here."""
    available = available_backends(device, operator)
    if requested is None:
        return available[0]
    if requested not in available:
        raise ValueError(
            f"no {operator} backend {requested!r} on {device.type}; "
            f"available: {', '.join(available)}"
        )
    return requested


def _runs(backend: str, device: torch.device) -> bool:
    """Whether a kind of kernel runs on this kind of device, and is installed."""
    if backend == "native":
        return device.type == "cpu" and native.is_available()
    if backend == "triton":
        return device.type == "cuda" and triton_launching.is_available()
    return True
