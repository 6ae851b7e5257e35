"""Data sets of the `datasets` library: streamed from the Hugging Face hub, or saved in a folder.

A source is written hf:NAME[:CONFIG][:SPLIT]. NAME is an id on the hub, a folder of files that the
library understands, or a folder made by `save_to_disk`; SPLIT is train unless it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from receptance.storage.directories import expanded

_SAVED = ("state.json", "dataset_dict.json")
_SPLIT = "train"
# The records of files that end so are read one by one when the files are named themselves.
_RECORDS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")


def describe(name: str) -> tuple[str, int, int]:
    """The kind ("rows" or "stream"), the number of rows and the time of the last change in ns."""
    folder, _, split = _parse(name)
    if not _is_saved(folder):
        _open_stream(name)  # a wrong name is noticed now, and not after hours of work
        return "stream", 0, 0
    rows = open_rows(name)
    marks = [Path(folder) / mark for mark in (*_SAVED, f"{split or _SPLIT}/{_SAVED[0]}")]
    return "rows", len(rows), max(m.stat().st_mtime_ns for m in marks if m.is_file())


def open_rows(name: str) -> Any:
    """Map a data set in a folder that `save_to_disk` has made."""
    datasets = _datasets()
    folder, _, split = _parse(name)
    try:
        found = datasets.load_from_disk(folder)
    except Exception as error:
        raise ValueError(f"cannot read {name}: {_said(error)}") from error
    if isinstance(found, datasets.Dataset):
        only = str(found.split or _SPLIT)
        found, split = {only: found}, split or only
    split = split or _SPLIT
    if split not in found:
        raise ValueError(f"{name}: no split {split!r}; there are {', '.join(found)}")
    return found[split]


def row_groups(name: str, size: int) -> Iterator[tuple[int, int, int]]:
    """The ranges of about `size` bytes each in a saved data set: first row, end, bytes."""
    rows = open_rows(name)
    per_row = max(1, rows.data.nbytes // max(1, len(rows)))
    step = max(1, size // per_row)
    for begin in range(0, len(rows), step):
        end = min(begin + step, len(rows))
        yield begin, end, (end - begin) * per_row


def read_rows(name: str, begin: int, end: int, field: str | None) -> Iterator[tuple[int, dict]]:
    """Some rows of a saved data set with their numbers from 0; of each only the field, if any."""
    rows = _only(open_rows(name), field)
    for number in range(begin, end):
        try:
            row = rows[number]
        except Exception as error:
            raise ValueError(f"cannot read {name}, row {number + 1}: {_said(error)}") from error
        yield number, row


def read_stream(name: str, skip: int, field: str | None) -> Iterator[dict]:
    """The records of a streamed data set from number `skip` on."""
    number, stream = skip, _only(_open_stream(name), field)
    try:
        for row in stream.skip(skip) if skip else stream:
            yield row
            number += 1
    except Exception as error:
        about = f"cannot read {name} after record {number}: {_said(error)}"
        raise ValueError(about + _advice(_parse(name)[0], error)) from error


def _open_stream(name: str) -> Any:
    datasets = _datasets()
    folder, config, split = _parse(name)
    try:
        return datasets.load_dataset(folder, config, split=split or _SPLIT, streaming=True)
    except Exception as error:
        raise ValueError(f"cannot open {name}: {_said(error)}") from error


# The library passes on whatever its readers, the files that they read and the network raise, so its
# calls stand inside `except Exception`.


def _said(error: Exception) -> str:
    """The text of an error of the library, in one line."""
    if isinstance(error, StopIteration):
        return "there are no records"
    wrapped = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
    return " ".join(str(wrapped or error).split()) or type(error).__name__


def _advice(folder: str, error: Exception) -> str:
    """What to do when a stream ends with an error."""
    if not Path(folder).is_dir():
        return "; run again to continue" if isinstance(error, OSError) else ""
    if not any(file.name.lower().endswith(_RECORDS) for file in Path(folder).rglob("*")):
        return ""
    where = f"{folder.rstrip('/')}/"
    return f"; name the files themselves ({where}) to have bad records named or left out"


def _only(rows: Any, field: str | None) -> Any:
    return rows.select_columns([field]) if field in (rows.column_names or ()) else rows


def _is_saved(folder: str) -> bool:
    return any((Path(folder) / mark).is_file() for mark in _SAVED)


def _parse(name: str) -> tuple[str, str | None, str | None]:
    """The folder or id, the configuration and the split of a name."""
    parts = name.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise ValueError(
            f"{name}: a data set is written hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    folder = str(expanded(parts[0])) if parts[0].startswith("~") else parts[0]
    return folder, parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError("hf: sources need the datasets library: pip install datasets") from None
    return datasets
