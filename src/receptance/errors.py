"""Errors from outside this package, such as those of disks, turned into one-line messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def one_line(path: Path, what: str = "") -> Iterator[None]:
    """Re-raise disk errors inside the block as one ValueError: cannot write PATH: REASON.

    `what` is put before the path, such as "the state to ".
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, OSError) and error.filename in {None, str(path)}:
            reason = error.strerror or reason
        raise ValueError(f"cannot write {what}{path}: {reason}") from error


def out_of_memory(error: Exception) -> bool:
    """Whether Python or torch ran out of memory, on a GPU or the CPU, without importing torch."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)
