"""Copying tensors to a device without waiting, so that the CPU prepares the next step meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """The CPU's tensor x on a device.

    The copy to a GPU starts from pinned memory: one from ordinary memory would wait until the GPU
    has finished all the work it was given.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
