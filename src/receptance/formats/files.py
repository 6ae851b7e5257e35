"""The first check of every reader: whether a file can be read and is not plainly something else."""

from __future__ import annotations

from pathlib import Path

_SOMETHING_ELSE = {
    b"version https://git-lfs": "a Git LFS pointer, not the file: run `git lfs pull`",
    b"<!DOCTYPE": "a web page, not weights: download the file itself",
    b"<!doctype": "a web page, not weights: download the file itself",
    b"<html": "a web page, not weights: download the file itself",
    b"GGUF": "a GGUF file; read it with formats.read",
    b"fmgg": "an rwkv.cpp file; read it with formats.read",
    b"lmgg": "an rwkv.cpp (ggml) file, which this release does not read",
}


def check_file(path: Path) -> None:
    """ValueError, starting with the path, unless this is a readable file that may hold weights."""
    start = _first_bytes(path)
    if not start:
        raise ValueError(f"{path}: the file is empty; download or save it again")
    for magic, what in _SOMETHING_ELSE.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: this is {what}")


def _first_bytes(path: Path) -> bytes:
    try:
        # This is asked before the file is opened, because opening a pipe would wait for ever.
        if path.is_file() or not path.exists():
            with path.open("rb") as file:
                return file.read(64)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ValueError(f"{path}: cannot be read: {reason(error)}") from None
    raise ValueError(f"{path}: this is a directory or a device, not a file")


def reason(error: Exception) -> str:
    """The reason of an error on one line, for the end of a message of our own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
