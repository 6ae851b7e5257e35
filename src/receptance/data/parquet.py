"""Parquet files, which are read one group of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# This many rows are made into Python objects at a time.
_ROWS = 256


def row_groups(path: str, size: int) -> Iterator[tuple[int, int, int]]:
    """The groups of rows of a file, each as its number, its number + 1 and its bytes."""
    about = _open(path).metadata
    for group in range(about.num_row_groups):
        yield group, group + 1, about.row_group(group).total_byte_size


def read_rows(
    path: str, begin: int, end: int, field: str | None
) -> Iterator[tuple[int, dict | ValueError]]:
    """The rows of some groups with their numbers from 0; of each only the field, if it exists.

    In place of a row with text that is not UTF-8 stands the error that says so.
    """
    import pyarrow

    file = _open(path)
    number = sum(file.metadata.row_group(group).num_rows for group in range(begin))
    columns = [field] if field in file.schema_arrow.names else None
    try:
        for batch in file.iter_batches(_ROWS, row_groups=range(begin, end), columns=columns):
            for row in _rows(batch):
                yield number, row
                number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {path} after row {number}: {error}") from None


def _rows(batch: Any) -> list[dict | ValueError]:
    try:
        found: list[dict | ValueError] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [ValueError(f"not UTF-8 ({error.reason})")]
        return [row for at in range(len(batch)) for row in _rows(batch.slice(at, 1))]
    return found


def _open(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet needs the pyarrow library: pip install pyarrow"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
