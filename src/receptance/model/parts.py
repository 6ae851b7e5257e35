"""The parts that versions of RWKV share: token shift, and layers with a fixed rule for dtypes.

Activations have the compute dtype. Parameters may be wider, as float32 master weights are in
bfloat16 training; every layer casts its parameters to the dtype of its input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """A matrix without a bias; its weight is [out,in], as in the official files."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))

    def orthogonal_(self, scale: float, generator: torch.Generator) -> None:
        """Draw orthogonal starting values, scaled up if the matrix widens its input (RWKV-LM)."""
        outputs, inputs = self.weight.shape
        gain = scale * max(1.0, outputs / inputs) ** 0.5
        nn.init.orthogonal_(self.weight, gain=gain, generator=generator)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias, which start at 1 and 0."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], in x's dtype."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


class Reading(NamedTuple):
    """The arguments of a call that tell which positions are real and where a row begins afresh."""

    resets: Tensor | None = None
    """[B,T] bool, true at positions where a row begins afresh."""
    lengths: Tensor | None = None
    """[B], the number of real positions of each row."""


def token_shift(x: Tensor, last: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Each position's predecessor, and each row's last position: [B,T,C], [B,C] -> [B,T,C], [B,C].

    `last` precedes the first position of a row; zero precedes a reset position (equations 11 to
    15, x_0 = 0).
    """
    extended = torch.cat([last.to(x.dtype)[:, None], x], dim=1)
    previous = extended[:, :-1]
    if reading.resets is not None:
        previous = previous.masked_fill(reading.resets[..., None], 0)
    if reading.lengths is None:
        # The last position is copied, because FSDP warns if a block returns a view.
        return previous, extended[:, -1].clone()
    rows = torch.arange(x.shape[0], device=x.device)
    return previous, extended[rows, reading.lengths]


def mix(x: Tensor, previous: Tensor, share: Tensor) -> Tensor:
    """share * x + (1 - share) * previous: [B,T,C], [B,T,C], [1,1,C] -> [B,T,C]."""
    return torch.lerp(previous, x, share.to(x.dtype))
