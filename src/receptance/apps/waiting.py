"""What a terminal shows while a command has nothing else to show."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Piece = TypeVar("Piece")

_PATIENCE = 1.5
"""Seconds in which a command may be silent."""
_ERASE = "\r\x1b[K"


@contextlib.contextmanager
def waiting(what: str, patience: float = _PATIENCE) -> Iterator[None]:
    """Show on a terminal what the block waits for and since when, if that takes a while.

    The line is on standard error, counts seconds, and is erased at the end of the block.
    """
    terminal = sys.stderr
    if terminal is None or not terminal.isatty():
        yield
        return
    done = threading.Event()

    def count() -> None:
        began = time.monotonic()
        pause, shown = patience, False
        with contextlib.suppress(OSError):
            while not done.wait(pause):
                terminal.write(f"{_ERASE}{what} ... {time.monotonic() - began:.0f} s")
                terminal.flush()
                pause, shown = 1.0, True
            if shown:
                terminal.write(_ERASE)
                terminal.flush()

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def until_first(what: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces; a terminal shows what the first of them waits for."""
    iterator = iter(pieces)
    with waiting(what):
        first = list(itertools.islice(iterator, 1))
    yield from first
    yield from iterator
