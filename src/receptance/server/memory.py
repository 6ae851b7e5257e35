"""`Memory`: what large requests leave behind is given back to the operating system."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Mapping
from functools import cache

# The parts of a body of so many bytes scatter over memory that malloc keeps when they are gone.
_LARGE = 1 << 16
# Seconds after which memory is given back, once for all requests until then.
_LATER = 0.5


class Memory:
    """Asks glibc for the memory that it keeps, soon after large requests.

    One event loop uses it. Elsewhere than with glibc it does nothing.
    """

    def __init__(self) -> None:
        self._planned = False

    def note(self, headers: Mapping[str, str]) -> None:
        """A request with these headers has been answered."""
        length = headers.get("content-length", "")
        small = length.isdigit() and len(length) < 9 and int(length) < _LARGE
        if small or self._planned or not (length or "transfer-encoding" in headers):
            return
        self._planned = True
        asyncio.get_running_loop().call_later(_LATER, self._give_back)

    def _give_back(self) -> None:
        self._planned = False
        asyncio.get_running_loop().run_in_executor(None, _trim(), 0)


@cache
def _trim() -> Callable[[int], int]:
    """glibc's malloc_trim, or a function that does nothing."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda pad: 0
    return found
