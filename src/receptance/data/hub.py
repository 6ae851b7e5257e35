"""Data sets of the `datasets` library: streamed from the Hugging Face hub, or saved in a folder.

A source is written hf:NAME[:CONFIG][:SPLIT]. NAME is an id on the hub, a folder of files that the
library understands, or a folder made by `save_to_disk`; SPLIT is train unless it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from receptance.directories import expanded

_SAVED = ("state.json", "dataset_dict.json")


def describe(name: str) -> tuple[str, int, int]:
    """Kind ("rows" or "stream"), number of rows, time of the last change in ns."""
    folder, _, split = _parse(name)
    if not _is_saved(folder):
        _open_stream(name)  # now, lest a wrong name is noticed after hours
        return "stream", 0, 0
    rows = open_rows(name)
    marks = [Path(folder) / mark for mark in _SAVED] + [Path(folder) / split / _SAVED[0]]
    return "rows", len(rows), max(m.stat().st_mtime_ns for m in marks if m.is_file())


def open_rows(name: str) -> Any:
    """A data set in a folder of `save_to_disk`, mapped."""
    datasets = _datasets()
    folder, _, split = _parse(name)
    try:
        found = datasets.load_from_disk(folder)
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    except KeyError:
        raise ValueError(f"{name}: no split {split!r}; there are {', '.join(found)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {name}: {error}") from None


def row_groups(name: str, size: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of rows of a saved data set with about `size` bytes each: begin, end, bytes."""
    rows = open_rows(name)
    per_row = max(1, rows.data.nbytes // max(1, len(rows)))
    step = max(1, size // per_row)
    for begin in range(0, len(rows), step):
        end = min(begin + step, len(rows))
        yield begin, end, (end - begin) * per_row


def read_rows(name: str, begin: int, end: int, field: str | None) -> Iterator[tuple[int, dict]]:
    """Some rows of a saved data set with their numbers from 0; only the field, if it is there."""
    rows = _only(open_rows(name), field)
    return ((number, rows[number]) for number in range(begin, end))


def read_stream(name: str, skip: int, field: str | None) -> Iterator[dict]:
    """The records of a streamed data set from number `skip` on."""
    stream = _only(_open_stream(name), field)
    try:
        yield from stream.skip(skip) if skip else stream
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {name}: {error}; run again to continue") from error


def _open_stream(name: str) -> Any:
    folder, config, split = _parse(name)
    try:
        return _datasets().load_dataset(folder, config, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot open {name}: {error}") from None


def _only(rows: Any, field: str | None) -> Any:
    return rows.select_columns([field]) if field in (rows.column_names or ()) else rows


def _is_saved(folder: str) -> bool:
    return any((Path(folder) / mark).is_file() for mark in _SAVED)


def _parse(name: str) -> tuple[str, str | None, str]:
    parts = name.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise ValueError(
            f"{name}: a data set is written hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    folder = str(expanded(parts[0])) if parts[0].startswith("~") else parts[0]
    return folder, parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else "train"


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "hf: sources need the datasets library: pip install 'receptance[data]'"
        ) from None
    return datasets
