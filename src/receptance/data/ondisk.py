"""Arrays of tokens on disk: .npy files, written in pieces and mapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np

from receptance.atomic import written

Append = Callable[[np.ndarray], None]
"""A function that adds to the end of an array that is being written."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of tokens on disk: uint16, or uint32 when the ids need it."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@contextmanager
def npy_writer(path: Path, dtype: np.dtype) -> Iterator[Append]:
    """Write a one-dimensional .npy of a length that is known only at the end."""
    total = 0
    with written(path) as file:

        def append(array: np.ndarray) -> None:
            nonlocal total
            file.write(array.astype(dtype, copy=False).tobytes())
            total += len(array)

        _write_header(file, dtype, 0)
        begin = file.tell()
        yield append
        file.seek(0)
        _write_header(file, dtype, total)
        assert file.tell() == begin, "numpy pads headers so that the length can grow in place"


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, about | {"shape": (length,)})


def map_npy(path: Path) -> np.ndarray:
    """Map a .npy of integers in one dimension; ValueError names a file that is something else."""
    try:
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise ValueError("it does not begin like one")
        array = np.load(path, mmap_mode="r")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    # numpy parses the header as Python, and passes on whatever error that raises.
    except (ValueError, EOFError, OverflowError, SyntaxError, TokenError, MemoryError) as error:
        about = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path} is not a whole .npy file: {about}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "ui":
        shape = getattr(array, "shape", "no shape")
        raise ValueError(
            f"{path} holds {getattr(array, 'dtype', 'no array')} of shape {shape}; "
            "tokens are integers in one dimension"
        )
    return array


def blocks(array: np.ndarray, size: int = 1 << 22) -> Iterator[np.ndarray]:
    """The array in order, in views of at most size items, so that a mapped file stays on disk."""
    return (array[begin : begin + size] for begin in range(0, len(array), size))
