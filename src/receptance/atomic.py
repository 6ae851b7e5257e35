"""Writing files: each appears whole or not at all, and replaces only a file of its own kind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from receptance.sealed import check_outside


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at path, complete and on disk, when the block ends.

    Until then the content is in a hidden file of a random name beside path. If the block raises an
    error, the hidden file is removed and path stays as it was. ValueError if path is in a
    checkpoint.
    """
    check_outside(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)  # The caller knows this name only.
        raise


def check_replaceable(path: Path, what: str, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """ValueError if there is anything at path but a file for which is_kind is true.

    Neither may path be in a checkpoint. The message needs what is to be written, such as "the
    state", and its kind, such as "a state".
    """
    if not os.path.lexists(path):
        return check_outside(path)
    with suppress(OSError):  # What cannot be read is not replaced either.
        if os.path.isfile(path) and is_kind(path):
            return check_outside(path)
    raise ValueError(
        f"cannot write {what} to {path}: what is there is not {kind}; choose another name"
    )


def check_folder(path: Path) -> None:
    """ValueError if there is something else than a folder at a path."""
    if os.path.lexists(path) and not path.is_dir():
        what = "a file" if path.exists() else "a link to nothing"
        raise ValueError(f"{path} is {what}; name a folder")
