"""Weights in the order in which the kernels read them, the same for every instruction set.

A matrix has N outputs and K inputs, as the weight [N,K] of `y = W x`. Three layouts:

    tiles      16 outputs side by side, whatever the input: every matrix that is read whole
    rows       all outputs of one input side by side: a matrix most of whose inputs are zero
               and skipped
    embedding  the weight as it is, because one row at a time is read

Padding is zero. Kp is K rounded up to a multiple of 128, G the inputs of a group.

    tiles      floats  [N/16, K, 16]              (n,k) at [n/16, k, n%16]
               int8    [N/16, Kp/4, 16, 4]        (n,k) at [n/16, k/4, n%16, k%4]
                       params [N/16, Kp/128, 16]          the scale
               int4    [N/16, Kp/8, 16, 4]        4 bytes are a little-endian word of 8 codes of
                                                  k = 8 i .. 8 i + 7, the first in the lowest bits
                       params [N/16, Kp/G, 2, 16]         scale, minimum
    rows       floats  [K, N]                     N is a multiple of 64
               int8    [K, N/64, 16, 4]           (n,k) at [k, n/64, n%16, n%64/16]
                       params [K/128, N]
               int4    [K, N/64, 8, 4]            little-endian words of 8 codes: of 64 outputs the
                                                  word n%8 has n%8, n%8 + 8, ..., the first in the
                                                  lowest bits
                       params [K/G, 2, N]
    embedding  floats  [N, K]
               int8    [N, K]                     params [N, K/128]
               int4    [N, K/2]                   the even k in the low bits
                       params [N, K/G, 2]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.model.architecture import Layout
from receptance.quantize import Quantized, QuantizedKind, ceil_div

FloatKind = Literal["float32", "bfloat16", "float16"]
Kind = FloatKind | QuantizedKind
Shape = tuple[int, ...]

FLOATS: dict[FloatKind, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "float16", "int8", "int4")
"""The kinds in the order of the enum Weight in native/rwkv4.h."""
_CODES = {"int8": torch.int8, "int4": torch.uint8}
# A tile has 16 outputs. The outputs of the layout "rows" are padded to a multiple of 64, the inputs
# of quantized tiles to a multiple of 128.
_TILE, _ROW, _DEPTH = 16, 64, 128


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in one of the layouts."""

    kind: Kind
    layout: Layout
    outputs: int
    """N, the number of outputs without padding."""
    inputs: int
    """K, the number of inputs without padding."""
    group: int
    """The number of inputs that share their parameters; 0 for floats."""
    data: Tensor
    params: Tensor | None
    """The bfloat16 scales, with minimums for int4; None for floats."""

    def __post_init__(self) -> None:
        data, params = shapes(self.kind, self.layout, self.outputs, self.inputs, self.group)
        found = None if self.params is None else tuple(self.params.shape)
        if (tuple(self.data.shape), found) != (data, params):
            raise ValueError(
                f"a {self.kind} matrix of {self.outputs} outputs and {self.inputs} inputs as "
                f"{self.layout} has {list(self.data.shape)} and {found}; wanted {list(data)} and "
                f"{params}"
            )
        if not self.data.is_contiguous() or not (
            self.params is None or self.params.is_contiguous()
        ):
            raise ValueError("packed tensors must be contiguous: the kernels take addresses")
        types = (self.data.dtype, None if self.params is None else self.params.dtype)
        if types != dtypes(self.kind):
            raise ValueError(f"a {self.kind} matrix is stored as {types}, not {dtypes(self.kind)}")

    @property
    def nbytes(self) -> int:
        """The size of weights and parameters in bytes, with padding."""
        return self.data.nbytes + (0 if self.params is None else self.params.nbytes)


def common_kind(tensors: Iterable[Tensor]) -> FloatKind:
    """The type that all tensors have; if there are several, float32, which holds them all."""
    found = {x.dtype for x in tensors}
    return next((kind for kind, dtype in FLOATS.items() if found == {dtype}), "float32")


def dtypes(kind: Kind) -> tuple[torch.dtype, torch.dtype | None]:
    """The types of a packed matrix's data and parameters."""
    if kind in FLOATS:
        return FLOATS[cast(FloatKind, kind)], None
    return _CODES[kind], torch.bfloat16


def shapes(
    kind: Kind, layout: Layout, outputs: int, inputs: int, group: int
) -> tuple[Shape, Shape | None]:
    """The shapes of a packed matrix's data and parameters (see the top of this file)."""
    if kind in FLOATS:
        return _float_shape(layout, outputs, inputs), None
    pair = () if kind == "int8" else (2,)
    groups = ceil_div(inputs, group)
    if layout == "tiles":
        tiles, depth = ceil_div(outputs, _TILE), _round_up(inputs, _DEPTH)
        per_word = 4 if kind == "int8" else 8
        data = (tiles, depth // per_word, _TILE, 4)
        return data, (tiles, depth // group, *pair, _TILE)
    if layout == "rows":
        wide = _round_up(outputs, _ROW)
        words = 16 if kind == "int8" else 8
        return (inputs, wide // _ROW, words, 4), (groups, *pair, wide)
    return (outputs, inputs if kind == "int8" else ceil_div(inputs, 2)), (outputs, groups, *pair)


def pack(weight: Tensor | Quantized, layout: Layout) -> Packed:
    """Pack a matrix [N,K], a tensor of one of the three float types or codes, into a layout."""
    if isinstance(weight, Quantized):
        data = _pack_data(weight.codes, weight.kind, layout)
        params = _pack_params(weight.params(), weight.kind, layout, weight.group)
        return Packed(weight.kind, layout, *weight.shape, weight.group, data, params)
    kind = next((kind for kind, dtype in FLOATS.items() if dtype == weight.dtype), None)
    if kind is None or weight.dim() != 2:
        raise ValueError(
            f"a matrix to pack is {weight.dtype} {list(weight.shape)}; wanted [N,K] in one of "
            f"{', '.join(FLOATS)}"
        )
    outputs, inputs = weight.shape
    return Packed(kind, layout, outputs, inputs, 0, _pack_data(weight, kind, layout), None)


def unpack(packed: Packed) -> Tensor | Quantized:
    """Undo `pack`; every bit comes back."""
    kind, outputs, inputs = packed.kind, packed.outputs, packed.inputs
    data = _unpack_data(packed.data, kind, packed.layout)[:outputs, :inputs].contiguous()
    if packed.params is None:
        return data
    groups = ceil_div(inputs, packed.group)
    params = _unpack_params(packed.params, kind, packed.layout)[:outputs, :groups]
    scale, *minimum = (x.contiguous() for x in params.unbind(-1))
    code_kind = cast(QuantizedKind, kind)
    return Quantized(code_kind, packed.group, data, scale, minimum[0] if minimum else None)


def _pack_data(x: Tensor, kind: Kind, layout: Layout) -> Tensor:
    """Pack weights or codes [N,K], which have no padding, into the layout."""
    if layout == "tiles":
        return _tile(x, kind)
    if layout == "embedding":
        return _pairs(_pad(x, 1, 2)) if kind == "int4" else x.contiguous()
    x = _pad(x, _ROW, 1).T
    return x.contiguous() if kind in FLOATS else _words(x, kind)


def _unpack_data(data: Tensor, kind: Kind, layout: Layout) -> Tensor:
    """Undo `_pack_data`; the padding stays."""
    if layout == "tiles":
        return _untile(data, kind)
    if layout == "embedding":
        return _unpairs(data) if kind == "int4" else data
    return (data if kind in FLOATS else _unwords(data, kind)).T


def _pack_params(params: Tensor, kind: Kind, layout: Layout, group: int) -> Tensor:
    """Pack parameters [N,K/G,P] into the layout; P is 1 for int8 and 2 for int4."""
    if layout == "tiles":
        params = _pad(params, _TILE, _DEPTH // group)
        params = params.unflatten(0, (-1, _TILE)).permute(0, 2, 3, 1)
    elif layout == "rows":
        params = _pad(params, _ROW, 1).permute(1, 2, 0)
    axis = -1 if layout == "embedding" else -2
    return (params.squeeze(axis) if kind == "int8" else params).contiguous()


def _unpack_params(params: Tensor, kind: Kind, layout: Layout) -> Tensor:
    """Undo `_pack_params`; the padding stays."""
    if kind == "int8":
        params = params.unsqueeze(-1 if layout == "embedding" else -2)
    if layout == "tiles":
        return params.permute(0, 3, 1, 2).flatten(0, 1)
    return params.permute(2, 0, 1) if layout == "rows" else params


def _tile(x: Tensor, kind: Kind) -> Tensor:
    """Pack [N,K] into tiles; 4 bytes of codes are moved as one word."""
    if kind in FLOATS:
        return _interleave(_pad(x, _TILE, 1))
    x = _pad(x, _TILE, _DEPTH)
    packed = _pairs(x) if kind == "int4" else x
    return _interleave(packed.view(torch.int32)).view(x.dtype).unflatten(-1, (_TILE, 4))


def _untile(data: Tensor, kind: Kind) -> Tensor:
    if kind in FLOATS:
        return data.transpose(1, 2).flatten(0, 1)
    words = data.flatten(2).view(torch.int32).transpose(1, 2).flatten(0, 1)
    codes = words.contiguous().view(data.dtype)
    return _unpairs(codes) if kind == "int4" else codes


def _interleave(x: Tensor) -> Tensor:
    """Put 16 outputs side by side: [N,D] -> [N/16,D,16]."""
    return x.unflatten(0, (-1, _TILE)).transpose(1, 2).contiguous()


def _pairs(codes: Tensor) -> Tensor:
    """Put two neighbors into a byte, the even one in the low bits: [...,K] -> [...,K/2]."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).contiguous()


def _unpairs(data: Tensor) -> Tensor:
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def _words(codes: Tensor, kind: Kind) -> Tensor:
    """Pack codes [K,N] into rows: 64 outputs make words as the top of this file says."""
    words = 16 if kind == "int8" else 8
    codes = codes.unflatten(1, (-1, _ROW // words, words)).transpose(2, 3)
    return (_pairs(codes) if kind == "int4" else codes).contiguous()


def _unwords(data: Tensor, kind: Kind) -> Tensor:
    codes = _unpairs(data) if kind == "int4" else data
    return codes.transpose(2, 3).flatten(1)


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Fill [N,K,...] with zeros up to multiples of rows and columns."""
    missing = (-x.shape[0] % rows, -x.shape[1] % columns)
    if not any(missing):
        return x.contiguous()
    behind = (0, 0) * (x.dim() - 2)
    return F.pad(x, (*behind, 0, missing[1], 0, missing[0]))


def _float_shape(layout: Layout, outputs: int, inputs: int) -> Shape:
    if layout == "tiles":
        return ceil_div(outputs, _TILE), inputs, _TILE
    return (inputs, _round_up(outputs, _ROW)) if layout == "rows" else (outputs, inputs)


def _round_up(number: int, multiple: int) -> int:
    return ceil_div(number, multiple) * multiple
