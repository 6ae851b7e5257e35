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
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError.
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here: {reason}") from None
    return torch.device(name)


def described(device: torch.device) -> str:
    """A device in words, such as "cpu (2 threads)" or "cuda:0 (NVIDIA H200)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{device} ({threads} thread{'s' * (threads > 1)})"
    return str(device)
