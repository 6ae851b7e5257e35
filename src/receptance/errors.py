"""What goes wrong outside of this package, told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def one_line(path: Path, what: str = "") -> Iterator[None]:
    """Re-raise disk errors inside the block as one ValueError: cannot write PATH: REASON.

    what stands before the path, as "the state to " does.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, OSError) and error.filename == str(path):
            reason = error.strerror or reason
        raise ValueError(f"cannot write {what}{path}: {reason}") from error


def out_of_memory(error: Exception) -> bool:
    """As Python and torch say it, on GPUs and on the CPU; torch need not be imported for this."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)
