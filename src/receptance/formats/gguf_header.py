"""The header of a GGUF file: its keys and values, and the place of each tensor.

Layout: docs/gguf.md of ggml. The reader of the gguf package believes what a file says about counts
and makes an object of every element, so that a damaged or hostile file takes memory without bound
and a vocabulary takes seconds. This one checks every number against the length of the file first,
and decodes a value when it is asked for.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from receptance.formats.ggml import BLOCK, KINDS, Bytes, block_bytes
from receptance.formats.names import some
from receptance.model.architecture import Shape

MAGIC = b"GGUF"
KEY_ALIGNMENT = "general.alignment"
_VERSIONS = (2, 3)
_START = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of keys
ALIGNMENT = 32
"""The bytes to a multiple of which tensors begin, unless a file has another number for it."""
_MAX_ALIGNMENT = 1 << 20
# Real files have about 50 keys, 1,500 tensors and 130,000 strings in lists.
_MAX_KEYS = 4096
_MAX_TENSORS = 10_000
_MAX_STRINGS = 1 << 23
_MAX_NAME = 1 << 16
_MAX_AXES = 4

_STRING, _LIST, _BOOL = 8, 9, 7
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_SIZES = {code: np.dtype(kind).itemsize for code, kind in _NUMBERS.items()}

FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<i2"),
}
"""The numpy types of the stored types that are no blocks; BF16 has none of its own."""
_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K",
          11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}  # fmt: skip
SUPER_BLOCK = 256
"""The number of values in a block of the types that end in _K."""
SUPER_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
"""The size in bytes of a block of these types (ggml-common.h)."""


@dataclass(frozen=True)
class Entry:
    """The type and shape of a tensor, and its place in the file."""

    kind: str
    shape: Shape
    offset: int
    size: int


@dataclass(frozen=True)
class _Value:
    """The type of a value, and where it begins; a list has several of one type."""

    code: int
    offset: int
    count: int
    is_list: bool


class Fields:
    """The values of a file by key. Each is decoded when it is asked for."""

    def __init__(self, data: Bytes, values: dict[str, _Value]) -> None:
        self._data = data
        self._values = values

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def number(self, key: str) -> int | float | None:
        """The number under a key, None without one; ValueError if there is anything else."""
        value = self._values.get(key)
        if value is None:
            return None
        if value.is_list or value.code == _STRING:
            raise ValueError(f"its key {some([key])} is no number")
        found: int | float = self._array(value)[0].item()
        return found

    def text(self, key: str) -> str | None:
        """The text under a key, None without one; ValueError if there is anything else."""
        value = self._values.get(key)
        if value is None:
            return None
        if value.is_list or value.code != _STRING:
            raise ValueError(f"its key {some([key])} is no text")
        return self._strings(value)[0].decode("utf-8", errors="replace")

    def texts(self, key: str) -> list[bytes]:
        """The texts in the list under a key, none without one; ValueError if it is another list."""
        value = self._list(key)
        if value is not None and value.code != _STRING:
            raise ValueError(f"its key {some([key])} is no list of texts")
        return [] if value is None else self._strings(value)

    def numbers(self, key: str) -> list[int]:
        """The whole numbers in the list under a key, none without one; ValueError for others."""
        value = self._list(key)
        if value is not None and value.code not in _WHOLE:
            raise ValueError(f"its key {some([key])} is no list of whole numbers")
        return [] if value is None else self._array(value).tolist()

    def _list(self, key: str) -> _Value | None:
        value = self._values.get(key)
        if value is not None and not value.is_list:
            raise ValueError(f"its key {some([key])} is no list")
        return value

    def _array(self, value: _Value) -> np.ndarray:
        end = value.offset + value.count * _SIZES[value.code]
        return self._data[value.offset : end].view(_NUMBERS[value.code])

    def _strings(self, value: _Value) -> list[bytes]:
        cursor = _Cursor(self._data, value.offset)
        return [cursor.string() for _ in range(value.count)]


_WHOLE = frozenset(code for code, kind in _NUMBERS.items() if kind[1] in "ui")


def read_header(data: Bytes) -> tuple[Fields, dict[str, Entry]]:
    """The keys and values of a file, and its tensors: stored name to place.

    Shapes are in the order of torch, in which the last axis is contiguous. ValueError, without the
    file's name, if anything does not fit into the file or is of an unknown type.
    """
    if len(data) < _START.size:
        _cut_short()
    magic, version, tensors, keys = _START.unpack_from(data.data)
    assert magic == MAGIC
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        about = "of a machine with the other order of bytes" if swapped else f"version {version}"
        raise ValueError(
            f"it is a GGUF file {about}; this release reads little-endian files of versions "
            f"{' and '.join(map(str, _VERSIONS))}"
        )
    _check_count("keys", keys, _MAX_KEYS)
    _check_count("tensors", tensors, _MAX_TENSORS)
    cursor = _Cursor(data, _START.size)
    values = _read_values(cursor, keys)
    fields = Fields(data, values)
    return fields, _read_entries(cursor, tensors, _alignment(fields))


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"it claims to have {count} {what}; no RWKV model has more than {most}")


def _alignment(fields: Fields) -> int:
    found = fields.number(KEY_ALIGNMENT)
    if found is None:
        return ALIGNMENT
    if not isinstance(found, int) or not 0 < found <= _MAX_ALIGNMENT or found & (found - 1):
        raise ValueError(f"its key {KEY_ALIGNMENT} is {found}; it must be a power of two")
    return found


class _Cursor:
    """A place in the file that moves on as values are read, and never beyond the end."""

    def __init__(self, data: Bytes, at: int) -> None:
        self._data, self._buffer = data, data.data
        self.at, self.end = at, len(data)

    def skip(self, size: int) -> int:
        """Move on by so many bytes; returns where they begin."""
        begin, self.at = self.at, self.at + size
        if self.at > self.end:
            _cut_short()
        return begin

    def u32(self) -> int:
        """The next four bytes as a number."""
        found: int = _U32.unpack_from(self._buffer, self.skip(4))[0]
        return found

    def u64(self) -> int:
        """The next eight bytes as a number."""
        found: int = _U64.unpack_from(self._buffer, self.skip(8))[0]
        return found

    def string(self) -> bytes:
        """A length, and as many bytes."""
        begin = self.skip(self.u64())
        return self._data[begin : self.at].tobytes()

    def name(self) -> str:
        """A string that is short."""
        length = self.u64()
        if not 0 < length < _MAX_NAME:
            raise ValueError(f"it has a name of {length} bytes; it is damaged")
        begin = self.skip(length)
        return self._data[begin : self.at].tobytes().decode("utf-8", errors="replace")


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def _read_values(cursor: _Cursor, count: int) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    strings = 0
    for _ in range(count):
        key = cursor.name()
        if key in values:
            raise ValueError(f"it has two keys {some([key])}; it is damaged")
        code, length, is_list = cursor.u32(), 1, False
        if code == _LIST:
            code, length, is_list = cursor.u32(), cursor.u64(), True
        values[key] = _Value(code, cursor.at, length, is_list)
        if code in _SIZES:
            cursor.skip(length * _SIZES[code])
        elif code == _STRING:
            strings += length
            _check_count("texts", strings, _MAX_STRINGS)
            for _ in range(length):
                cursor.skip(cursor.u64())
        else:
            raise ValueError(f"its key {some([key])} has a value of the unknown type {code}")
    return values


# ---- tensors ------------------------------------------------------------------------------------


def _read_entries(cursor: _Cursor, count: int, alignment: int) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for _ in range(count):
        name = cursor.name()
        if name in found:
            raise ValueError(f"it has two tensors named {some([name])}; it is damaged")
        axes = cursor.u32()
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError(f"its tensor {some([name])} has {axes} axes; it is damaged")
        shape = tuple(cursor.u64() for _ in range(axes))[::-1]
        kind, size = _size(name, cursor.u32(), shape)
        offset = cursor.u64()
        if offset % alignment:
            raise ValueError(f"its tensor {some([name])} begins at {offset}, which is not aligned")
        found[name] = Entry(kind, shape, offset, size)
    start = cursor.at + -cursor.at % alignment
    placed = {name: Entry(e.kind, e.shape, start + e.offset, e.size) for name, e in found.items()}
    _check_places(placed, cursor.end)
    return placed


def _size(name: str, code: int, shape: Shape) -> tuple[str, int]:
    """The type of a tensor, and the size of its data in bytes."""
    if code not in _TYPES:
        known = ", ".join(_TYPES.values())
        raise ValueError(f"its tensor {some([name])} is of type {code}; this release reads {known}")
    kind, count = _TYPES[code], math.prod(shape)
    if min(shape) < 1:
        raise ValueError(f"its tensor {some([name])} has the shape {shape}; it is damaged")
    if kind in FLOATS:
        return kind, count * FLOATS[kind].itemsize
    block = block_values(kind)
    if shape[-1] % block:
        raise ValueError(
            f"its tensor {some([name])} is {kind} and has rows of {shape[-1]} values; they must "
            f"be a multiple of {block}"
        )
    return kind, count // block * (SUPER_BYTES.get(kind) or block_bytes(kind))


def block_values(kind: str) -> int:
    """The number of values in a block of a quantized type."""
    return BLOCK if kind in KINDS else SUPER_BLOCK


def _check_places(entries: dict[str, Entry], length: int) -> None:
    """ValueError unless every tensor lies in the file, and none in another."""
    before, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1].offset):
        if entry.offset < end:
            raise ValueError(
                f"its tensors {some([before])} and {some([name])} overlap; it is damaged"
            )
        before, end = name, entry.offset + entry.size
        if end > length:
            _cut_short()


def _cut_short() -> NoReturn:
    raise ValueError("it ends too early: cut short or damaged; get it again")
