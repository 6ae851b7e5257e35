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
        orthogonal_(self.weight, scale, generator)


def orthogonal_(matrix: Tensor, scale: float, generator: torch.Generator) -> None:
    """Draw orthogonal values, scaled up if the matrix has more rows than columns (RWKV-LM)."""
    rows, columns = matrix.shape
    gain = scale * max(1.0, rows / columns) ** 0.5
    nn.init.orthogonal_(matrix, gain=gain, generator=generator)


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


class GroupNorm(nn.Module):
    """Layer norm within each of several groups of channels, with weight and bias."""

    def __init__(self, groups: int, width: int, epsilon: float) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,C], in x's dtype."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        groups = x.unflatten(-1, (self.groups, -1))
        normal = F.layer_norm(groups, groups.shape[-1:], eps=self.epsilon)
        return torch.addcmul(bias, normal.flatten(-2), weight)


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


def low_rank(inputs: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Two matrices through a narrow middle, stored with their inputs first: [in,rank], [rank,in].

    That is how the official files have them, while the weight of a `Linear` is [out,in].
    """
    return nn.Parameter(torch.empty(inputs, rank)), nn.Parameter(torch.empty(rank, inputs))


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """[...,in], [in,out] -> [...,out], in x's dtype."""
    return x @ matrix.to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """The same tensor, in float32 unless it is as wide already."""
    return x if x.dtype.itemsize >= 4 else x.float()


def depth_fractions(layer: int, num_layers: int) -> tuple[float, float]:
    """Two measures of a layer's depth: one falls from 1 to about 0, one rises from 0 to 1."""
    return 1 - layer / num_layers, layer / max(num_layers - 1, 1)
