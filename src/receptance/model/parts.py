"""What the versions of RWKV share: token shift, and layers with an explicit policy on dtypes.

Activations have the compute dtype, parameters may be wider (float32 masters while training in
bfloat16); every layer casts what it needs to the dtype of its input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """A matrix without bias, weight [out,in] as in the official files."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))

    def orthogonal_(self, scale: float, generator: torch.Generator) -> None:
        """Orthogonal start; a matrix that widens keeps the scale of its output (RWKV-LM)."""
        outputs, inputs = self.weight.shape
        gain = scale * max(1.0, outputs / inputs) ** 0.5
        nn.init.orthogonal_(self.weight, gain=gain, generator=generator)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias, starting as the identity."""

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
    """What the positions of a batch mean, the same for every layer."""

    resets: Tensor | None = None  # [B,T] bool: positions at which a row begins afresh
    lengths: Tensor | None = None  # [B]: how many positions of a row are real


def token_shift(x: Tensor, last: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Each position's predecessor, and each row's last one: [B,T,C], [B,C] -> [B,T,C], [B,C].

    A reset position has no predecessor: it sees zero (equations 11 to 15, x_0 = 0).
    """
    extended = torch.cat([last.to(x.dtype)[:, None], x], dim=1)
    previous = extended[:, :-1]
    if reading.resets is not None:
        previous = previous.masked_fill(reading.resets[..., None], 0)
    if reading.lengths is None:
        # The last position is copied, because FSDP warns of views in what a block returns.
        return previous, extended[:, -1].clone()
    rows = torch.arange(x.shape[0], device=x.device)
    return previous, extended[rows, reading.lengths]


def mix(x: Tensor, previous: Tensor, share: Tensor) -> Tensor:
    """share of x and 1 - share of its predecessor: [B,T,C], [B,T,C], [1,1,C] -> [B,T,C]."""
    return torch.lerp(previous, x, share.to(x.dtype))
