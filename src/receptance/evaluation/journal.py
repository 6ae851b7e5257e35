"""What an evaluation has computed so far, on disk: it survives Ctrl-C, kill -9 and a full disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

_FORMAT = "receptance-journal"
# How every journal begins.
_BEGINNING = b'{"format":"receptance-journal"'


class Journal:
    """Records that are only ever appended, one JSON object a line, and what they belong to.

    The first line is the identity: the model, the tokenizer and all else that decides the records.
    A last line that was cut off while it was written is dropped. `records` are those that an
    earlier run has left. ValueError if the file holds anything else, records of another identity,
    or is in use by another process.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        wanted = {"format": _FORMAT, **json.loads(json.dumps(identity))}
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no file; what is computed is kept there, so move it away")
        try:
            # Unbuffered: what was added is with the system, whatever becomes of this process.
            self._file: BinaryIO = path.open("ab+", buffering=0)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
        try:
            self._lock()
            self._open(wanted)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record. OSError if the disk is full; then the next run drops its torn line."""
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(
            errors="surrogatepass"
        )
        content = memoryview(line + b"\n")
        while content:  # A file without a buffer may take a part.
            content = content[self._file.write(content) or 0 :]

    def remove(self) -> None:
        """Delete the file, because its records have become part of a result."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _open(self, wanted: dict[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        whole, torn = lines[:-1], lines[-1]
        found = [_parsed(line) for line in whole]
        if not _is_ours((found[0] or {}) if whole else None, torn):
            raise ValueError(
                f"{self.path} is not what an evaluation has kept; choose another name for the "
                "result, or move that file away"
            )
        if torn:
            self._file.truncate(sum(len(line) + 1 for line in whole))
        if not whole:
            self.add(wanted)
        elif found[0] != wanted:
            raise ValueError(
                f"{self.path} holds what was computed before with {_difference(found[0], wanted)}; "
                "choose another name for the result, or delete that file"
            )
        self.records = [record for record in found[1:] if record is not None]

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows has no such locks.
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use by another process; wait until that has ended"
            ) from None
        except OSError:
            return  # Some network disks have no locks.


def journal_path(result: Path) -> Path:
    """Where the records for a result are kept: beside it, with `.progress` behind its name."""
    return result.with_name(result.name + ".progress")


def _is_ours(first: Mapping[str, Any] | None, torn: bytes) -> bool:
    """Whether a file that begins with this line, or holds only this torn one, is a journal."""
    if first is not None:
        return first.get("format") == _FORMAT
    return torn[: len(_BEGINNING)] == _BEGINNING[: len(torn)]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _difference(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
    """The first field in which two identities differ, in words."""
    found = found or {}
    name = next(n for n in [*wanted, *found] if found.get(n) != wanted.get(n))
    was, now = (_short(each.get(name)) for each in (found, wanted))
    return f"another {name.replace('_', ' ')} ({was}, now {now})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
