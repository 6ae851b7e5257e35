"""`StateDirectory`: snapshots of states as files, which outlive the server.

A snapshot is two files. NAME.ids holds the namespace and the token ids, and NAME is the sha256 of
its content; NAME.state is a state file with a digest of its own. The second one is written last,
and one without the other is dropped when the directory is opened.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from receptance.atomic import written
from receptance.state import State

_IDS, _STATE = ".ids", ".state"
_NAMESPACE = 64  # hexadecimal digits
# States that wait to be written hold at most so many bytes; beyond that, none is accepted.
_WAITING_BYTES = 1 << 28


class StateDirectory:
    """A shelf of the state cache (see `Shelf`) with at most `budget` bytes in a directory.

    A thread writes, so that nobody waits for a disk; `close` waits for it. What cannot be written,
    because a disk is full for example, is counted in `failures` and not kept. Namespaces are 64
    hexadecimal digits.
    """

    def __init__(self, directory: Path, budget: int) -> None:
        self.directory, self.budget = directory, budget
        self.failures = self.damaged = 0
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the oldest first
        self._waiting: dict[str, State] = {}
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._queue: SimpleQueue[tuple[str, bytes, State] | None] = SimpleQueue()
        self._texts = dict(self._open())
        self._thread = threading.Thread(target=self._write_all, name="states", daemon=True)
        self._thread.start()

    def texts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The namespaces and token ids that were there when the directory was opened."""
        texts, self._texts = self._texts, {}
        for content in texts.values():
            ids = np.frombuffer(content[_NAMESPACE:], "<i4")
            yield content[:_NAMESPACE].decode("ascii"), tuple(ids.tolist())

    def has(self, namespace: str, tokens: Sequence[int]) -> bool:
        """Whether there is a snapshot, or one that waits to be written."""
        name = _name(_content(namespace, tokens))
        with self._lock:
            return name in self._sizes or name in self._waiting

    def put(self, namespace: str, tokens: Sequence[int], state: State) -> None:
        """Keep a snapshot, unless too many wait to be written."""
        content = _content(namespace, tokens)
        name = _name(content)
        with self._lock:
            full = self._waiting_bytes + state.nbytes > _WAITING_BYTES
            if name in self._sizes or name in self._waiting or full:
                return
            self._waiting[name] = state
            self._waiting_bytes += state.nbytes
        self._queue.put((name, content, state))

    def get(self, namespace: str, tokens: Sequence[int]) -> State | None:
        """A snapshot; one that is damaged is removed, counted and not returned."""
        name = _name(_content(namespace, tokens))
        with self._lock:
            if (waiting := self._waiting.get(name)) is not None:
                return waiting
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
        try:
            return State.load(self.directory / (name + _STATE), namespace)
        except (ValueError, OSError):
            self.damaged += 1
            self._remove(name)
            return None

    def close(self) -> None:
        """Wait until everything has been written."""
        self._queue.put(None)
        self._thread.join()

    # ---- files ------------------------------------------------------------------------------

    def _open(self) -> Iterator[tuple[str, bytes]]:
        """The whole entries of the directory, by age; what is damaged is removed."""
        for partial in self.directory.glob(".*.partial"):
            partial.unlink(missing_ok=True)
        found = []
        for path in self.directory.glob(f"*{_IDS}"):
            with suppress(OSError):
                state = path.with_suffix(_STATE).stat()
                found.append((state.st_mtime_ns, path.stem, state.st_size + path.stat().st_size))
        for _, name, size in sorted(found):
            try:
                content = (self.directory / (name + _IDS)).read_bytes()
            except OSError:
                content = b""
            if _name(content) == name and _is_content(content):
                self._sizes[name] = size
                yield name, content
        damaged = set()
        for path in [*self.directory.glob(f"*{_IDS}"), *self.directory.glob(f"*{_STATE}")]:
            if path.stem not in self._sizes:
                damaged.add(path.stem)
                path.unlink(missing_ok=True)
        self.damaged += len(damaged)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            name, content, state = item
            try:
                self._write(name, content, state)
            # safetensors and torch have errors of their own for what cannot be written.
            except (OSError, ValueError, RuntimeError):
                self.failures += 1
                self._remove(name)
            finally:
                with self._lock:
                    del self._waiting[name]
                    self._waiting_bytes -= state.nbytes

    def _write(self, name: str, content: bytes, state: State) -> None:
        ids, file = self.directory / (name + _IDS), self.directory / (name + _STATE)
        with written(ids) as opened:
            opened.write(content)
        state.save(file, content[:_NAMESPACE].decode("ascii"))
        with self._lock:
            self._sizes[name] = os.path.getsize(ids) + os.path.getsize(file)
            total, old = sum(self._sizes.values()), []
            for other, size in self._sizes.items():
                if total <= self.budget:
                    break
                old.append(other)
                total -= size
        for other in old:
            self._remove(other)

    def _remove(self, name: str) -> None:
        with self._lock:
            self._sizes.pop(name, None)
        for ending in (_STATE, _IDS):
            with suppress(OSError):
                (self.directory / (name + ending)).unlink(missing_ok=True)


def _content(namespace: str, tokens: Sequence[int]) -> bytes:
    assert len(namespace) == _NAMESPACE
    return namespace.encode("ascii") + np.asarray(tokens, "<i4").tobytes()


def _is_content(content: bytes) -> bool:
    size = len(content) - _NAMESPACE
    return size > 0 and size % 4 == 0 and content[:_NAMESPACE].isalnum()


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
