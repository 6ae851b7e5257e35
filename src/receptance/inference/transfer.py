"""From the host to a device without waiting for it: a step of a GPU is prepared while one runs."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. A copy from ordinary memory would wait for all its work."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
