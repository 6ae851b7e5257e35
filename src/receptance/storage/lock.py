"""The lock that lets one process at a time write into the folder of a run."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from receptance.atomic import check_folder
from receptance.storage.directories import clean, expanded

_LOCK, _HOLDER = ".lock", ".lock-holder"


class RunLock:
    """A lock that keeps other processes from writing into a run's folder inside a `with` block.

    A folder that was made for the lock is removed if the block fails before it wrote anything.
    The operating system releases the lock when the process ends, however it ends. On entry, files
    that a killed process left unfinished are removed. ValueError names the holder if the folder is
    in use, or says why the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder)

    def __enter__(self) -> RunLock:
        from filelock import FileLock, Timeout

        check_folder(self.folder)
        self._made = not self.folder.exists()
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
            reason = error.strerror or error
            raise ValueError(f"{self.folder} cannot be locked: {reason}") from None
        # The holder's name is kept in a second file, because some releases of filelock empty the
        # file that they lock. A full disk, where it cannot be written, need not stop the run.
        with suppress(OSError):
            name = f"process {os.getpid()} on {socket.gethostname()}"
            (self.folder / _HOLDER).write_text(name)
        with suppress(OSError):
            clean(self.folder)
        return self

    def _holder(self) -> str:
        with suppress(OSError, UnicodeDecodeError):
            return (self.folder / _HOLDER).read_text() or "another process"
        return "another process"

    def __exit__(self, kind: object, *_: object) -> None:
        with suppress(OSError):
            (self.folder / _HOLDER).unlink(missing_ok=True)
            if kind is not None and self._made and os.listdir(self.folder) == [_LOCK]:
                (self.folder / _LOCK).unlink()
                self.folder.rmdir()
        self._lock.release()
