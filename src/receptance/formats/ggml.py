"""The quantized blocks of ggml: 32 values of a row, a scale, perhaps a minimum, and small integers.

Layouts are those of ggml-common.h, values those of ggml-quants.c (`dequantize_row_*` and
`quantize_row_*_ref`). Until May 2023 scales of some kinds were wider, and neighbors shared a byte
(ggml.c at ff6e03cb); such blocks are called old here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
"""The number of values in a block; a row of a quantized matrix has a whole number of blocks."""

# This many blocks are handled at a time, so that intermediate results stay small.
_AT_ONCE = 1 << 15

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Kind:
    """The way in which blocks of one kind store values: scale * (code - zero) [+ minimum]."""

    bits: int
    zero: int = 0
    minimum: bool = False
    old_scale: str = "<f4"

    def layout(self, old: bool) -> np.dtype:
        """The fields of a block in the order of its bytes."""
        scale = self.old_scale if old else "<f2"
        fields: list[tuple] = [("scale", scale)]
        fields += [("minimum", scale)] if self.minimum else []
        fields += [("fifth", "<u4")] if self.bits == 5 else []
        fields += [("codes", "i1", (BLOCK,)) if self.bits == 8 else ("codes", "u1", (BLOCK // 2,))]
        return np.dtype(fields)


KINDS = {
    "Q4_0": Kind(4, zero=8),
    "Q4_1": Kind(4, minimum=True),
    "Q5_0": Kind(5, zero=16, old_scale="<f2"),
    "Q5_1": Kind(5, minimum=True, old_scale="<f2"),
    "Q8_0": Kind(8),
}


def block_bytes(kind: str, *, old: bool = False) -> int:
    """The size of one block in bytes."""
    return KINDS[kind].layout(old).itemsize


def dequantize(data: Bytes, kind: str, *, old: bool = False) -> Floats:
    """The values that whole blocks stand for: [bytes] -> [values] float32."""
    layout = KINDS[kind].layout(old)
    blocks = data.view(layout)
    values = np.empty((len(blocks), BLOCK), np.float32)
    for start in range(0, len(blocks), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        values[part] = _values(blocks[part], KINDS[kind], old)
    return values.reshape(-1)


def quantize(values: Floats, kind: str) -> Bytes:
    """Blocks of consecutive values, for the kind "Q8_0" or "Q4_0": [values] float32 -> [bytes].

    The values must fill whole blocks. ValueError if a scale is not finite in float16.
    """
    encode = {"Q8_0": _q8_0, "Q4_0": _q4_0}[kind]
    rows = values.reshape(-1, BLOCK)
    blocks = np.empty(len(rows), KINDS[kind].layout(False))
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        blocks["scale"][part], blocks["codes"][part] = encode(rows[part])
    return blocks.view(np.uint8)


def _values(blocks: np.ndarray, kind: Kind, old: bool) -> Floats:
    codes = blocks["codes"] if kind.bits == 8 else _nibbles(blocks["codes"], old)
    if kind.bits == 5:
        fifth = blocks["fifth"][:, None] >> np.arange(BLOCK, dtype=np.uint32) & 1
        codes = codes | fifth.astype(np.uint8) << 4
    whole = codes.astype(np.float32) - np.float32(kind.zero)
    # Scales that are not finite are passed on, for the checks of the weights to find.
    with np.errstate(invalid="ignore", over="ignore"):
        values = whole * blocks["scale"].astype(np.float32)[:, None]
        if kind.minimum:
            values += blocks["minimum"].astype(np.float32)[:, None]
    return values


def _nibbles(codes: Bytes, old: bool) -> Bytes:
    halves = codes & 15, codes >> 4
    if old:
        return np.stack(halves, axis=2).reshape(len(codes), BLOCK)
    return np.concatenate(halves, axis=1)


def _q8_0(rows: Floats) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    largest = np.abs(rows).max(axis=1)
    scaled, scale = _scaled(rows, largest / np.float32(127))
    # C's roundf takes halves away from zero; float64 makes the sum exact.
    return scale, np.trunc(scaled + np.copysign(0.5, scaled).astype(np.float64)).astype(np.int8)


def _q4_0(rows: Floats) -> tuple[NDArray[np.float16], Bytes]:
    at = np.abs(rows).argmax(axis=1)
    scaled, scale = _scaled(rows, np.take_along_axis(rows, at[:, None], 1)[:, 0] / np.float32(-8))
    codes = np.minimum(np.trunc(scaled + np.float32(8.5)), 15).astype(np.uint8)
    low, high = np.split(codes, 2, axis=1)
    return scale, low | high << 4


def _scaled(rows: Floats, scale: Floats) -> tuple[Floats, NDArray[np.float16]]:
    """The rows divided by their scales in float32, and the scales as they are stored."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse, stored = np.float32(1) / scale, scale.astype(np.float16)
    # The inverse of a tiny scale overflows. Its block is zero in float16, so zero codes are right.
    inverse[~np.isfinite(inverse)] = 0
    if not np.isfinite(stored).all():
        raise ValueError("it has values that are not finite, or too large for float16 scales")
    return rows * inverse[:, None], stored
