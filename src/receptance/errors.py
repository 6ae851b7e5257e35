"""What errors mean, where neither their type nor their module says."""

from __future__ import annotations


def out_of_memory(error: Exception) -> bool:
    """As Python and torch say it, on GPUs and on the CPU; torch need not be imported for this."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)
