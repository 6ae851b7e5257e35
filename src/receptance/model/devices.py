"""The names of devices."""

from __future__ import annotations

import torch

AUTO = "auto"
"""The name that stands for a GPU where torch can use one, and otherwise for the CPU."""


def resolve_device(device: torch.device | str) -> torch.device:
    """The device of that name, or the one that "auto" stands for.

    ValueError if torch cannot compute on it.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == AUTO else device
    try:
        found = torch.device(name)
    except RuntimeError:
        raise _unusable(name, "torch knows no such device; take auto, cpu or cuda") from None
    if found.type == "cpu" and found.index:
        raise _unusable(name, "all processors are one device; take cpu")
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise _unusable(name, f"{reason[:200]}; take cpu, or see `receptance doctor`") from None
    return found


def _unusable(name: torch.device | str, reason: str) -> ValueError:
    return ValueError(f"device {str(name)!r} cannot be used here: {reason}")


def described(device: torch.device) -> str:
    """A device in words, such as "cpu (2 threads)" or "cuda:0 (NVIDIA H200)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{device} ({threads} thread{'s' * (threads > 1)})"
    return str(device)
