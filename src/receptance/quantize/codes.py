"""The weights that codes stand for: int8 has a scale, int4 a scale and a minimum, by group.

    int8   w ~ scale * code               codes -127..127; 128 inputs of an output share a scale
    int4   w ~ scale * code + minimum     codes 0..15; 32, 64 or 128 inputs share both

Scales and minimums are bfloat16. They are rounded before the codes are chosen, so that the codes
make up for their rounding.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

QuantizedKind = Literal["int8", "int4"]

GROUPS: dict[QuantizedKind, tuple[int, ...]] = {"int8": (128,), "int4": (32, 64, 128)}
USUAL_INT4_GROUP = 64
# The number of rows whose errors are computed at a time.
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix of N outputs and K inputs as codes."""

    kind: QuantizedKind
    group: int
    """G, the inputs of an output that share a scale; the last group may be shorter."""
    codes: Tensor
    """[N,K], int8 for int8 and uint8 for int4."""
    scale: Tensor
    """[N,K/G] bfloat16."""
    minimum: Tensor | None
    """[N,K/G] bfloat16; None for int8."""

    def __post_init__(self) -> None:
        check_group(self.kind, self.group)
        dtype = torch.int8 if self.kind == "int8" else torch.uint8
        groups = (self.codes.shape[0], ceil_div(self.codes.shape[1], self.group))
        params = [self.scale] if self.minimum is None else [self.scale, self.minimum]
        fits = all(x.dtype == torch.bfloat16 and x.shape == groups for x in params)
        if self.codes.dtype != dtype or not fits or len(params) != 1 + (self.kind == "int4"):
            raise ValueError(
                f"{self.kind} codes are {self.codes.dtype} {list(self.codes.shape)} with "
                f"{[list(x.shape) for x in params]}; wanted {dtype} with bfloat16 {list(groups)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, N and K."""
        return self.codes.shape[0], self.codes.shape[1]

    def params(self) -> Tensor:
        """The scales, and the minimums if there are any: [N,K/G,1] or [N,K/G,2] bfloat16."""
        parts = [self.scale] if self.minimum is None else [self.scale, self.minimum]
        return torch.stack(parts, dim=-1)

    def rows(self, piece: slice) -> Quantized:
        """The codes of some outputs."""
        minimum = None if self.minimum is None else self.minimum[piece]
        return Quantized(self.kind, self.group, self.codes[piece], self.scale[piece], minimum)

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for: [N,K] float32."""
        inputs = self.codes.shape[1]
        codes = F.pad(self.codes, (0, -inputs % self.group)).unflatten(1, (-1, self.group))
        weight = self.scale.float()[..., None] * codes
        if self.minimum is not None:
            weight += self.minimum.float()[..., None]
        return weight.flatten(1)[:, :inputs].contiguous()


def relative_error(weight: Tensor, quantized: Quantized) -> float:
    """The root of the sum of squared errors over the sum of squared weights, for a matrix [N,K]."""
    error = total = 0.0
    for start in range(0, len(weight), _ROWS):
        piece = slice(start, start + _ROWS)
        exact = weight[piece].double()
        total += float(exact.square().sum())
        error += float((quantized.rows(piece).dequantize() - exact).square_().sum())
    return (error / total) ** 0.5 if total else 0.0


def ceil_div(number: int, divisor: int) -> int:
    """The quotient number / divisor, rounded up."""
    return -(-number // divisor)


def check_group(kind: str, group: int | None) -> int:
    """The group size, where None means the usual one; ValueError if there is no such format."""
    if kind not in GROUPS:
        found, known_kinds = reprlib.repr(kind), " or ".join(GROUPS)
        raise ValueError(f"weights cannot be quantized to {found}; choose {known_kinds}")
    known = GROUPS[cast(QuantizedKind, kind)]
    if group is None:
        return known[-1] if kind == "int8" else USUAL_INT4_GROUP
    if group not in known:
        raise ValueError(
            f"{kind} has no groups of {group} weights; choose {' or '.join(map(str, known))}"
        )
    return group
