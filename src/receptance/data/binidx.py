"""The .bin and .idx pair of RWKV-LM and Megatron.

The layout is that of `IndexedDataset` in Megatron-LM (megatron/core/datasets/indexed_dataset.py),
little-endian throughout. x.bin: the tokens of all sequences, nothing else. x.idx:

    magic      9 bytes  "MMIDIDX" and two zero bytes
    version    u64      1
    dtype      u8       see DTYPES
    sequences  u64      n
    documents  u64      m, counting the 0 in front of the borders
    sizes      n × i32  tokens of each sequence
    pointers   n × i64  where each sequence begins in x.bin, in bytes
    borders    m × i64  0, then the number of sequences up to the end of each document

RWKV-LM's files hold one sequence per document, which ends with the end-of-text token.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from receptance.atomic import written
from receptance.data.ondisk import Append, blocks

MAGIC = b"MMIDIDX\0\0"
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_HEADER = struct.Struct("<9sQBQQ")
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class BinIdx:
    """The tokens of a pair, and where its documents end."""

    tokens: np.ndarray
    """[N] integers, mapped."""
    ends: np.ndarray
    """[documents] int64: the number of tokens up to the end of each document."""


def pair_of(path: Path) -> tuple[Path, Path]:
    """The .bin and the .idx that x, x.bin or x.idx stands for, whether they exist or not."""
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx")


def stem_of(path: Path) -> Path | None:
    """The path x that x, x.bin and x.idx stand for if both files of the pair exist, else None."""
    pair = pair_of(path)
    return pair[0].with_suffix("") if all(file.is_file() for file in pair) else None


def read_binidx(path: Path) -> BinIdx:
    """Map the pair x.bin, x.idx that path (x, x.bin or x.idx) belongs to.

    ValueError names the file that is missing, damaged, or of a kind that is not read: sequences
    that are not stored one after another, or numbers that are not integers.
    """
    if stem_of(path) is None:
        raise ValueError(
            f"{path}: no such pair; both a .bin and its .idx are needed, or a corpus folder"
        )
    tokens, index = pair_of(path)
    try:
        dtype, sizes, borders = _read_index(index)
        ends = np.cumsum(sizes, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        found = tokens.stat().st_size
        if found != total * dtype.itemsize:
            raise ValueError(
                f"{tokens} has {found} bytes, but {index.name} describes {total * dtype.itemsize}"
            )
        array = np.memmap(tokens, dtype, "r") if total else np.zeros(0, dtype)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from None
    return BinIdx(array, np.concatenate([[0], ends])[borders[1:]])


def unclosed(pair: BinIdx, end_of_text: int, at_most: int | None = None) -> np.ndarray:
    """[K] int64: the ends of the documents whose last token is not end_of_text.

    The end of the whole array is not among them. If there are more than at_most documents, only
    that many, evenly spaced, are looked at.
    """
    ends, found = pair.ends, []
    if at_most is not None and len(ends) > at_most:
        ends = ends[np.linspace(0, len(ends) - 1, at_most).astype(np.int64)]
    for some in blocks(ends):
        inner = some[(some > 0) & (some < len(pair.tokens))]
        found.append(inner[pair.tokens[inner - 1] != end_of_text])
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def _read_index(file: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """The dtype, sizes [n] and borders [m] of an .idx; ValueError if they contradict each other."""
    with file.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{file} is not an .idx file: it does not begin with {MAGIC[:7].decode()}")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1:
        raise ValueError(f"{file} has version {version}; only version 1 is known")
    dtype = DTYPES.get(code)
    if dtype is None or dtype.kind == "f":
        raise ValueError(f"{file} has number type {code}; tokens are of one of 1, 2, 3, 4, 5, 8")
    wanted = _HEADER.size + 12 * sequences + 8 * documents
    if file.stat().st_size < wanted:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes and claims {sequences} sequences and "
            f"{documents} documents, which take {wanted}; it was cut off or damaged"
        )
    content = np.memmap(file, np.uint8, "r")[_HEADER.size :]
    sizes = content[: 4 * sequences].view("<i4")
    pointers = content[4 * sequences : 12 * sequences].view("<i8")
    borders = np.array(content[12 * sequences :][: 8 * documents].view("<i8"))
    _check_index(file, dtype, sizes, pointers, borders)
    return dtype, sizes, borders


def _check_index(
    file: Path, dtype: np.dtype, sizes: np.ndarray, pointers: np.ndarray, borders: np.ndarray
) -> None:
    if len(sizes) and sizes.min() < 0:
        raise ValueError(f"{file} has a sequence of {sizes.min()} tokens; it is damaged")
    ends = np.cumsum(sizes, dtype=np.int64) * dtype.itemsize
    if not np.array_equal(pointers, ends - sizes.astype(np.int64) * dtype.itemsize):
        raise ValueError(f"{file}: the sequences do not follow each other in the .bin; not read")
    first, last = (borders[0], borders[-1]) if len(borders) else (-1, -1)
    # Files that training runs have used may have a single border, or lack the last one.
    if first != 0 or last > len(sizes) or (len(borders) > 1 and np.diff(borders).min() < 0):
        raise ValueError(f"{file}: the documents do not count up from 0 to {len(sizes)}; damaged")


@contextmanager
def binidx_writer(stem: Path, dtype: np.dtype, end_of_text: int) -> Iterator[Append]:
    """Write a pair in pieces, a sequence and document per end-of-text token."""
    stored = np.dtype("<i4") if dtype.itemsize == 4 else dtype.newbyteorder("<")
    if stored not in DTYPES.values():
        raise ValueError(f"a .bin file cannot hold {dtype}; wanted is uint16 or uint32")
    ends: list[np.ndarray] = []
    total = 0
    index, tokens = (stem.with_name(stem.name + suffix) for suffix in (".idx", ".bin"))
    # Whoever finds an .idx takes the .bin as whole, so an old .idx is removed before the .bin is
    # written, and the new one is written after it.
    index.unlink(missing_ok=True)
    with written(tokens) as file:

        def append(array: np.ndarray) -> None:
            nonlocal total
            for block in blocks(array):
                file.write(block.astype(stored, copy=False).tobytes())
                ends.append(np.flatnonzero(block == end_of_text) + (total + 1))
                total += len(block)

        yield append
    borders = np.concatenate([[0], *ends, [total]])
    sizes = np.diff(np.unique(borders))
    _write_index(index, stored, sizes)


def _write_index(file: Path, dtype: np.dtype, sizes: np.ndarray) -> None:
    if len(sizes) and sizes.max() > _LONGEST:
        raise ValueError(f"{file}: a document of {sizes.max()} tokens is too long for this format")
    code = next(code for code, known in DTYPES.items() if known == dtype)
    pointers = (np.cumsum(sizes) - sizes) * dtype.itemsize
    with written(file) as stream:
        stream.write(_HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1))
        stream.write(sizes.astype("<i4").tobytes())
        stream.write(pointers.astype("<i8").tobytes())
        stream.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
