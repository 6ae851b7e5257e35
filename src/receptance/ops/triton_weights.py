"""Matrices as the Triton kernels for decoding read them, and their conversion to floats.

A weight matrix [N,K] is stored by rows, as floats or in groups of G inputs:

    floats  data [N,K]
    int8    data [N,K'] int8            scale [N,K'/G]
    int4    data [N,K'/2] uint8         scale, minimum [N,K'/G]

K' is K rounded up to whole groups. Byte j of an int4 group holds input j in its low bits and input
j + G/2 in its high ones, so that both halves meet neighboring activations. Offsets have 64 bits.
"""
# mypy: disable-error-code="no-untyped-def"
# Triton gives the annotations of kernels a meaning of its own.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# The number of inputs that kernels take as a group where weights are floats.
FLOAT_GROUP = 128


@dataclass(frozen=True, eq=False)
class Weights:
    """One matrix, or several of one kind and K stacked: `first` outputs, then `rest` of each."""

    kind: str
    group: int
    first: int
    """Outputs of the first matrix."""
    rest: int
    """Outputs of every other matrix; 0 if there is none."""
    inputs: int
    data: Tensor
    scale: Tensor
    """[N,K'/G] bfloat16; unused for floats."""
    minimum: Tensor

    @property
    def outputs(self) -> int:
        """N, the outputs of all matrices together."""
        return self.data.shape[0]

    @property
    def matrices(self) -> int:
        """The number of matrices."""
        return 1 + ((self.outputs - self.first) // self.rest if self.rest else 0)

    @property
    def nbytes(self) -> int:
        """Memory of codes and parameters."""
        parts = {"int8": [self.scale], "int4": [self.scale, self.minimum]}.get(self.kind, [])
        return self.data.nbytes + sum(part.nbytes for part in parts)

    @property
    def group_bytes(self) -> int:
        """The number of bytes of data that a group of one output takes."""
        packed = self.group // 2 if self.kind == "int4" else self.group or FLOAT_GROUP
        return packed * self.data.itemsize

    @property
    def form(self) -> tuple[str, int]:
        """The arguments KIND and GROUP of the kernels."""
        return self.kind, self.group or FLOAT_GROUP

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that kernels read."""
        return self.data, self.scale, self.minimum


@triton.jit
def weight_at(data, scale, minimum, row, k, inputs, real, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The weights at rows and inputs of any one shape, float32."""
    groups = tl.cdiv(inputs, GROUP)
    row = row.to(tl.int64)
    if KIND == "int4":
        half: tl.constexpr = GROUP // 2
        within = k % GROUP
        byte = tl.load(data + row * (groups * half) + k // GROUP * half + within % half, real, 0)
        weight = ((byte >> (within // half * 4).to(tl.uint8)) & 15).to(tl.float32)
    elif KIND == "int8":
        weight = tl.load(data + row * (groups * GROUP) + k, real, 0).to(tl.float32)
    else:
        weight = tl.load(data + row * inputs + k, real, 0).to(tl.float32)
    if KIND == "int4" or KIND == "int8":
        weight *= tl.load(scale + row * groups + k // GROUP, real, 0).to(tl.float32)
    if KIND == "int4":
        weight += tl.load(minimum + row * groups + k // GROUP, real, 0).to(tl.float32)
    return weight


@triton.jit
def _dequantize_kernel(
    data, scale, minimum, out, start, count, inputs,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    real = (row < count) & (k < inputs)
    weight = weight_at(data, scale, minimum, start + row, k, inputs, real, KIND, GROUP)
    tl.store(out + row.to(tl.int64) * inputs + k, weight, real)


def dequantize(weights: Weights, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some outputs as floats: [N',K]."""
    start, stop, _ = rows.indices(weights.outputs)
    if weights.kind not in ("int8", "int4"):
        return weights.data[start:stop].to(dtype)
    size = stop - start, weights.inputs
    out = torch.empty(size, device=weights.data.device, dtype=dtype)
    grid = triton.cdiv(size[0], 32), triton.cdiv(size[1], 128)
    _dequantize_kernel[grid](*weights.arguments(), out, start, *size, *weights.form, 32, 128)
    return out
