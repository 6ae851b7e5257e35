"""Who may write into the folder of a run."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from receptance.storage.directories import clean, expanded

_LOCK, _HOLDER = ".lock", ".lock-holder"


class RunLock:
    """Keeps a second process from writing into a run's folder, as long as the block lasts.

    The kernel holds the lock and lets it go when the process ends, however it ends. What an
    earlier process left half done is tidied up on entry. ValueError, naming the holder, if the
    folder is in use.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder)

    def __enter__(self) -> RunLock:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / _LOCK, thread_local=False)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.folder} is in use by {self._holder()}; wait until that has ended, stop "
                "it, or choose another folder"
            ) from None
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be locked: {error}") from None
        # Beside the lock, not in it: some releases of filelock empty the file when they open it.
        with suppress(OSError):  # a full disk is no reason not to begin
            name = f"process {os.getpid()} on {socket.gethostname()}"
            (self.folder / _HOLDER).write_text(name)
        with suppress(OSError):
            clean(self.folder)
        return self

    def _holder(self) -> str:
        with suppress(OSError, UnicodeDecodeError):
            return (self.folder / _HOLDER).read_text() or "another process"
        return "another process"

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            (self.folder / _HOLDER).unlink(missing_ok=True)
        self._lock.release()
