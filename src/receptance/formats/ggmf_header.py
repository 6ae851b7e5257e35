"""The header of an rwkv.cpp file, and the places of its tensors, each of which has a header too.

Nothing that the file says about sizes is believed: everything must lie within its length.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from receptance.formats.ggml import BLOCK, Bytes, block_bytes
from receptance.formats.names import some
from receptance.model.architecture import Shape

MAGIC = b"fmgg"  # "ggmf" as a little-endian number
VERSIONS = (100, 101)
HEADER = struct.Struct("<4s5i")  # magic, version, vocabulary, width, layers, type
TENSOR = struct.Struct("<3i")  # axes, bytes of the name, type
FLOATS: dict[str, np.dtype] = {"FP32": np.dtype("<f4"), "FP16": np.dtype("<f2")}
"""The numpy types of those stored types that are not blocks of quantized values."""
TYPES = {0: "FP32", 1: "FP16", 2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}
_MAX_AXES = 3
_MAX_NAME = 256
_MAX_TENSORS = 10_000  # RWKV-4 14B has 726


@dataclass(frozen=True)
class Entry:
    """The place of a tensor in the file, its type and its shape."""

    kind: str
    shape: Shape
    offset: int
    size: int


def read_header(data: Bytes) -> list[int]:
    """The version, and the sizes: vocabulary, width and layers."""
    if len(data) < HEADER.size:
        _cut_short()
    _, version, *sizes, code = HEADER.unpack_from(data.data)
    if version not in VERSIONS:
        raise ValueError(
            f"it is of rwkv.cpp's file version {version}; this release reads "
            f"{' and '.join(map(str, VERSIONS))}"
        )
    _check_type(code, "the file")
    return [version, *sizes]


def read_entries(data: Bytes, version: int) -> Iterator[tuple[str, Entry]]:
    """The tensors of a file of this version, by stored name, in order."""
    offset, seen = HEADER.size, set()
    while offset < len(data):
        name, entry = _read_entry(data, offset, version)
        if name in seen:
            raise ValueError(f"it has two tensors named {some([name])}; it is damaged")
        seen.add(name)
        if len(seen) > _MAX_TENSORS:
            raise ValueError(f"it has more than {_MAX_TENSORS} tensors, more than any RWKV model")
        yield name, entry
        offset = entry.offset + entry.size


def _read_entry(data: Bytes, offset: int, version: int) -> tuple[str, Entry]:
    if offset + TENSOR.size > len(data):
        _cut_short()
    axes, length, code = TENSOR.unpack_from(data.data, offset)
    offset += TENSOR.size
    if not 1 <= axes <= _MAX_AXES or not 1 <= length <= _MAX_NAME:
        raise ValueError(
            f"where a tensor should begin it has {axes} axes and a name of {length} bytes; "
            "it is damaged or cut short"
        )
    if offset + 4 * axes + length > len(data):
        _cut_short()
    shape = struct.unpack_from(f"<{axes}i", data.data, offset)[::-1]
    offset += 4 * axes
    name = data[offset : offset + length].tobytes().decode("utf-8", errors="replace")
    offset += length
    size = _size(name, code, shape, version)
    if offset + size > len(data):
        _cut_short()
    return name, Entry(TYPES[code], shape, offset, size)


def _size(name: str, code: int, shape: Shape, version: int) -> int:
    """The size of a tensor's data in bytes."""
    _check_type(code, f"its tensor {some([name])}")
    if min(shape) < 1:
        raise ValueError(f"its tensor {some([name])} has the shape {shape}; it is damaged")
    kind, count = TYPES[code], math.prod(shape)
    if kind in FLOATS:
        return count * FLOATS[kind].itemsize
    if shape[-1] % BLOCK:
        raise ValueError(
            f"its tensor {some([name])} is {kind} and has rows of {shape[-1]} values; they must "
            f"be a multiple of {BLOCK}"
        )
    return count // BLOCK * block_bytes(kind, old=version == VERSIONS[0])


def _check_type(code: int, what: str) -> None:
    if code not in TYPES:
        known = ", ".join(f"{code} {name}" for code, name in TYPES.items())
        raise ValueError(f"{what} is of type {code}; this release reads {known}")


def _cut_short() -> NoReturn:
    raise ValueError("it ends in the middle of a tensor: cut short or damaged; get it again")
